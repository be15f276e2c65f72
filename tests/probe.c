/* What a container may do, asked of the kernel directly: the C library would hide the high bits of a family.
   probe FAMILY [TYPE [PROTOCOL]]   socket(2); numbers as 64 bits. Prints "ok" or the errno. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    unsigned long long given[3] = {0, 1, 0};
    for (int i = 1; i < argc && i <= 3; i++)
        given[i - 1] = strtoull(argv[i], NULL, 0);
    long fd = syscall(SYS_socket, given[0], given[1], given[2]);
    if (fd >= 0)
        puts("ok");
    else
        printf("%d\n", errno);
    return 0;
}
