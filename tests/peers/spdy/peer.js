// usage: node peer.js MODULES client|server PORT STREAMS BYTES
// client: opens STREAMS streams, sends BYTES on each, reads the echo; prints one line of JSON.
// server: listens, echoes every stream, answers one connection; prints the port first.
'use strict'
const [modules, role, port, streams, size] = process.argv.slice(2)
const { createRequire } = require('module')
const net = require('net')
const crypto = require('crypto')
const transport = createRequire(modules + '/')('spdy-transport')

function serve (socket, isServer) {
  const connection = transport.connection.create(socket, { protocol: 'spdy', isServer })
  connection.start(3.1)
  connection.on('error', (error) => { console.error(error); process.exit(1) })
  return connection
}

function one (connection, index, done) {
  const sent = crypto.createHash('sha256')
  const got = crypto.createHash('sha256')
  let count = 0
  connection.request({ path: '/' + index, headers: { index: String(index) } }, (error, stream) => {
    if (error) throw error
    stream.on('response', (status, headers) => {
      stream.on('data', (chunk) => { got.update(chunk); count += chunk.length })
      stream.on('end', () => done({ status, answer: headers.answer, count, same: sent.digest('hex') === got.digest('hex') }))
    })
    const data = crypto.randomBytes(Number(size))
    sent.update(data)
    stream.end(data)
  })
}

if (role === 'client') {
  const socket = net.connect(Number(port), '127.0.0.1', () => {
    const connection = serve(socket, false)
    const results = []
    connection.ping(() => {
      for (let index = 0; index < Number(streams); index++) {
        one(connection, index, (result) => {
          results.push(result)
          if (results.length === Number(streams)) {
            console.log(JSON.stringify(results))
            connection.end(() => socket.end())
          }
        })
      }
    })
  })
} else {
  const server = net.createServer((socket) => {
    server.close()
    serve(socket, true).on('stream', (stream) => {
      stream.respond(200, { answer: stream.headers.index })
      stream.pipe(stream)
    })
    socket.on('error', () => {})
  })
  server.listen(0, '127.0.0.1', () => console.log(server.address().port))
}
