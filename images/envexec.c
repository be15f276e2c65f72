/* Starts a program with environment variables that are not UTF-8: an OCI spec is JSON, and crun refuses other bytes.
 *
 * The agent has crun run this as /proc/self/fd/3, so that no file of it appears in the container, with the real
 * argv after it. fd 4 holds the variables, each "NAME=value" and a NUL; they replace those of the same name. fd 5
 * is a pipe: the number of the error when the program cannot be started, nothing when exec has closed it.
 * The program is looked up as crun does: a name without a slash in PATH, first regular file that may be executed.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PROGRAM = 3, VARIABLES = 4, REPORT = 5 };

static void fail(int error)
{
	if (write(REPORT, &error, sizeof error) < 0)
		error = EPIPE; /* nobody listens: the exit code has to do */
	_exit(error == ENOENT ? 127 : 126);
}

static void take_variables(void)
{
	struct stat file;
	if (fstat(VARIABLES, &file) < 0)
		fail(errno);
	char *block = malloc(file.st_size + 1), *end = block;
	if (!block)
		fail(ENOMEM);
	for (ssize_t got; end < block + file.st_size; end += got)
		if ((got = pread(VARIABLES, end, block + file.st_size - end, end - block)) <= 0)
			fail(got < 0 ? errno : EIO);
	*end = 0;
	for (char *item = block; item < end; item += strlen(item) + 1)
		if (putenv(item))
			fail(errno);
}

static int runnable(const char *path)
{
	struct stat file;
	return stat(path, &file) == 0 && S_ISREG(file.st_mode) && access(path, X_OK) == 0;
}

int main(int argc, char **argv)
{
	extern char **environ;
	const char *path;
	char candidate[PATH_MAX];

	if (argc < 2 || !*argv[1])
		fail(ENOENT);
	take_variables();
	close(PROGRAM);
	close(VARIABLES);
	if (fcntl(REPORT, F_SETFD, FD_CLOEXEC) < 0)
		_exit(126);
	argv++;
	if (strchr(argv[0], '/')) {
		execve(argv[0], argv, environ);
		fail(errno);
	}
	for (path = getenv("PATH"); path; path = strchr(path, ':') ? strchr(path, ':') + 1 : NULL) {
		int length = (int)strcspn(path, ":");
		int size = snprintf(candidate, sizeof candidate, "%.*s/%s", length ? length : 1,
				    length ? path : ".", argv[0]);
		if (size < (int)sizeof candidate && runnable(candidate)) {
			execve(candidate, argv, environ);
			fail(errno);
		}
	}
	fail(ENOENT);
}
