#define _GNU_SOURCE
#include "guest.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <net/if.h>
#include <net/route.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "channel.h"
#include "handover.h"
#include "mounts.h"
#include "plan.h"
#include "record.h"
#include "report.h"
#include "util.h"

#define WATCHED (3 * SESSIONS + 4)
#define STOP_MS 10000
#define TERM_MS 300 /* for what the service left behind */
#define INTERFACES 4
#define DATAGRAMS "4194304" /* bytes of a socket's datagrams that nobody has read yet */

static pid_t service;
static bool service_ended;

static const char *setting(const char *name)
{
    char full[64];

    snprintf(full, sizeof full, "stockade_%s", name);
    const char *value = getenv(full);
    return value == NULL ? "" : value;
}

/* A step of the start failed: the host is told, and a guest half up is of no use to anybody. */
static void guest_failure(int error, const char *step, const char *object)
{
    char text[512];
    const int length = snprintf(text, sizeof text, "guest step `%s` failed on `%s`: %s", step, object, strerror(error));

    dprintf(STDERR_FILENO, "stockade: %s\n", text);
    channel_frame(FRAME_FAULT, 0, text, (size_t)length);
    sync();
    reboot(RB_POWER_OFF);
}

/* In a child PID 1's way of failing would end the guest. */
static void child_failure(int error, const char *step, const char *object)
{
    dprintf(STDERR_FILENO, "stockade: `%s` failed on `%s`: %s\n", step, object, strerror(error));
}

static void mount_on(const char *type, const char *target, unsigned long flags, const char *options, bool needed)
{
    if (mount(type, target, type, flags, options) != 0 && errno != EBUSY && needed)
        fail("mount", target);
}

static void link_to(const char *target, const char *path)
{
    if (symlink(target, path) != 0 && errno != EEXIST)
        fail("symlink", path);
}

/* What the warden itself needs. */
static void first_mounts(void)
{
    mount_on("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL, true);
    mount_on("devtmpfs", "/dev", MS_NOSUID, "mode=0755", true);
}

static void system_mounts(void)
{
    mount_on("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY, NULL, false);
    mkdir("/dev/pts", 0755); /* EEXIST on a device file system that the kernel filled */
    mkdir("/dev/shm", 01777);
    mount_on("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666", true);
    mount_on("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777", true);
    link_to("/proc/self/fd", "/dev/fd");
    link_to("fd/0", "/dev/stdin");
    link_to("fd/1", "/dev/stdout");
    link_to("fd/2", "/dev/stderr");
}

static void load_module(const char *path)
{
    const int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST))
        fail("module", path);
    close(fd);
}

/* The modules that the image has for this very kernel, in the order of their names; then never another one. */
static void modules(void)
{
    struct utsname system;
    struct dirent **entries;
    char directory[256], path[PATH_MAX];

    uname(&system);
    snprintf(directory, sizeof directory, GUEST_HOME "/modules/%s", system.release);
    const int count = scandir(directory, &entries, NULL, alphasort);
    for (int i = 0; i < count; i++) {
        if (entries[i]->d_name[0] != '.') {
            snprintf(path, sizeof path, "%s/%s", directory, entries[i]->d_name);
            load_module(path);
        }
        free(entries[i]);
    }
    if (count >= 0)
        free(entries);
    if (!write_file("/proc/sys/kernel/modules_disabled", "1") && errno != ENOENT)
        fail("modules", "modules_disabled");
}

static void address(struct sockaddr *place, const char *text)
{
    struct sockaddr_in given = {.sin_family = AF_INET};

    if (inet_pton(AF_INET, text, &given.sin_addr) != 1) {
        errno = EINVAL;
        fail("network", text);
    }
    memcpy(place, &given, sizeof given);
}

/* `NAME,ADDRESS/PREFIX,GATEWAY,MTU`; the last two may be empty. */
static void interface_up(const char *wish)
{
    char text[256], *next = text;
    struct ifreq request = {0};
    const int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    snprintf(text, sizeof text, "%s", wish);
    const char *name = strsep(&next, ","), *own = strsep(&next, ","), *gateway = strsep(&next, ","),
               *mtu = strsep(&next, ",");
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    if (fd < 0)
        fail("network", name);
    if (own != NULL && *own != '\0') {
        char plain[64];
        const char *slash = strchr(own, '/');
        const unsigned long prefix = slash == NULL ? 32 : strtoul(slash + 1, NULL, 10);
        const struct in_addr bits = {.s_addr = prefix == 0 ? 0 : htonl(0xffffffffU << (32 - (prefix & 63)))};
        snprintf(plain, sizeof plain, "%.*s", (int)strcspn(own, "/"), own);
        address(&request.ifr_addr, plain);
        if (ioctl(fd, SIOCSIFADDR, &request) != 0)
            fail("network", own);
        address(&request.ifr_netmask, inet_ntoa(bits));
        if (ioctl(fd, SIOCSIFNETMASK, &request) != 0)
            fail("network", own);
    }
    if (mtu != NULL && *mtu != '\0') {
        request.ifr_mtu = atoi(mtu);
        if (ioctl(fd, SIOCSIFMTU, &request) != 0)
            fail("network", mtu);
    }
    if (ioctl(fd, SIOCGIFFLAGS, &request) != 0)
        fail("network", name);
    request.ifr_flags = (short)(request.ifr_flags | IFF_UP);
    if (ioctl(fd, SIOCSIFFLAGS, &request) != 0)
        fail("network", name);
    if (gateway != NULL && *gateway != '\0') {
        struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};
        address(&route.rt_gateway, gateway);
        address(&route.rt_dst, "0.0.0.0");
        address(&route.rt_genmask, "0.0.0.0");
        if (ioctl(fd, SIOCADDRT, &route) != 0)
            fail("network", gateway);
    }
    close(fd);
}

static void network(void)
{
    char name[16], text[128];

    interface_up("lo");
    for (int i = 0; i < INTERFACES; i++) {
        snprintf(name, sizeof name, "net%d", i);
        if (*setting(name) != '\0')
            interface_up(setting(name));
    }
    /* Every port may be the service's: nothing else listens here. */
    write_file("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
    /* UML's interface takes room for its largest packet for each: of the default three datagrams would fill a socket. */
    write_file("/proc/sys/net/core/rmem_max", DATAGRAMS);
    write_file("/proc/sys/net/core/rmem_default", DATAGRAMS);
    if (*setting("dns") != '\0') {
        const int fd = open("/etc/resolv.conf", O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0644);
        const int length = snprintf(text, sizeof text, "nameserver %s\n", setting("dns"));
        if (fd < 0 || !write_all(fd, text, (size_t)length))
            fail("network", "/etc/resolv.conf");
        close(fd);
    }
}

static void image_mounts(void)
{
    struct plan plan = {NULL, 0};
    size_t length = 0;
    const int fd = open(setting("mounts"), O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        fail("mounts", setting("mounts"));
    const char *bytes = read_all(fd, PLAN_LIMIT, &length);
    const char *why = bytes == NULL ? setting("mounts") : plan_parse(&plan, bytes, length);
    if (why != NULL)
        fail("mounts", why);
    close(fd);
    const int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        fail("mounts", "/");
    mounts_add(&plan, root);
    close(root);
    free(plan.records);
}

/* What the service says to syslog(3) goes to the console, one line each. -1: nobody asked for it. */
static int syslog_open(void)
{
    const struct sockaddr_un place = {.sun_family = AF_UNIX, .sun_path = "/dev/log"};

    if (*setting("syslog") == '\0')
        return -1;
    const int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || bind(fd, (const struct sockaddr *)&place, sizeof place) != 0 || chmod(place.sun_path, 0666) != 0)
        fail("syslog", place.sun_path);
    return fd;
}

static void syslog_read(int fd)
{
    char text[2048];
    ssize_t got;

    while (fd >= 0 && (got = recv(fd, text, sizeof text - 1, 0)) >= 0) {
        text[got] = '\0';
        dprintf(STDOUT_FILENO, "%s\n", text);
    }
}

/* The service is a plan, carried out by another warden, or a program of the image's own. */
static void start_service(void)
{
    static char path[] = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", home[] = "HOME=/root";
    static char *environment[] = {path, home, NULL};
    const char *plan = setting("plan"), *program = setting("program");
    sigset_t none;

    if (service != 0 || (*plan == '\0' && *program == '\0'))
        return;
    service = fork();
    if (service < 0)
        fail("fork", "service");
    if (service > 0) {
        channel_number(FRAME_STARTED, 0, (uint32_t)service);
        return;
    }
    failure_hook = child_failure;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setsid();
    if (*plan != '\0')
        execve(GUEST_INIT, (char *[]){(char[]){"warden"}, (char *)(uintptr_t)plan, NULL}, environment);
    else
        execve(program, (char *[]){(char *)(uintptr_t)program, NULL}, environment);
    fail("exec", *plan != '\0' ? GUEST_INIT : program);
}

static void reap(void)
{
    int status;
    pid_t pid;

    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        if (pid == service && !service_ended) {
            service_ended = true;
            channel_number(FRAME_ENDED, 0, exit_number(status));
        } else {
            channel_child(pid, status);
        }
}

static uint64_t now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000U + (uint64_t)now.tv_nsec / 1000000U;
}

/* Waits for the service, or for every process, at most so long. True when it is gone. */
static bool gone_within(uint64_t limit_ms, bool everybody)
{
    const uint64_t end = now_ms() + limit_ms;
    sigset_t child;

    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    for (;;) {
        reap();
        record_read(); /* what was typed is told when its reader ends */
        channel_serve();
        if (everybody ? waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD : service == 0 || service_ended)
            return true;
        const uint64_t now = now_ms();
        if (now >= end)
            return false;
        const struct timespec step = {.tv_nsec = 20000000L};
        sigtimedwait(&child, NULL, &step);
    }
}

/* Processes first: with one that writes no file system can be made read-only. */
static _Noreturn void power_off(void)
{
    const char *limit = setting("stop_ms");
    const int number = *setting("stop_signal") == '\0' ? SIGTERM : atoi(setting("stop_signal"));

    if (service > 0 && !service_ended) {
        kill(service, number);
        gone_within(*limit == '\0' ? STOP_MS : strtoull(limit, NULL, 10), false);
    }
    kill(-1, SIGTERM);
    if (!gone_within(TERM_MS, true)) {
        kill(-1, SIGKILL);
        gone_within(TERM_MS, true);
    }
    sync();
    mount("", "/", "", MS_REMOUNT | MS_RDONLY, NULL);
    sync();
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}

static int signals_open(void)
{
    const int numbers[] = {SIGCHLD, SIGINT, SIGTERM, SIGPWR};
    sigset_t set;

    sigemptyset(&set);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        sigaddset(&set, numbers[i]);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    /* The management console's `cad` is then a SIGINT, not a reset (reboot(2)). */
    reboot(RB_DISABLE_CAD);
    const int fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (fd < 0)
        fail("signals", "signalfd");
    return fd;
}

static bool told_to_stop(int signals)
{
    struct signalfd_siginfo seen;
    bool stop = false;

    while (read(signals, &seen, sizeof seen) == (ssize_t)sizeof seen)
        stop = stop || seen.ssi_signo != SIGCHLD;
    return stop;
}

/* The image has a PID 1 of its own, which mounts the rest and whose services are its own. */
static _Noreturn void other_system(void)
{
    if (*setting("line") != '\0')
        channel_open(setting("line"));
    modules();
    if (*setting("hostname") != '\0' && sethostname(setting("hostname"), strlen(setting("hostname"))) != 0)
        fail("hostname", setting("hostname"));
    network();
    hand_over(setting("system"));
}

_Noreturn void guest_main(void)
{
    struct pollfd watched[WATCHED];

    failure_hook = guest_failure;
    dprintf(STDOUT_FILENO, "stockade: guest starts\n");
    umask(022);
    first_mounts();
    if (*setting("system") != '\0')
        other_system();
    system_mounts();
    const int signals = signals_open();
    if (*setting("line") != '\0')
        channel_open(setting("line"));
    const int record = record_open();
    modules();
    if (*setting("hostname") != '\0' && sethostname(setting("hostname"), strlen(setting("hostname"))) != 0)
        fail("hostname", setting("hostname"));
    if (*setting("mounts") != '\0')
        image_mounts();
    network();
    const int syslog_socket = syslog_open();
    channel_frame(FRAME_READY, 0, "", 0);
    dprintf(STDOUT_FILENO, "stockade: guest is up\n");
    if (strcmp(setting("wait"), "1") != 0)
        start_service();
    for (;;) {
        watched[0] = (struct pollfd){.fd = signals, .events = POLLIN};
        watched[1] = (struct pollfd){.fd = syslog_socket, .events = POLLIN};
        watched[2] = (struct pollfd){.fd = record, .events = POLLIN};
        const size_t count = 3 + channel_watch(watched + 3, WATCHED - 3);
        poll(watched, count, -1);
        record_read();
        syslog_read(syslog_socket);
        bool stop = told_to_stop(signals);
        reap();
        const enum frame_kind request = channel_serve();
        if (record >= 0 && channel_lost()) { /* root in here can hang it up: what nobody is told of is not done */
            errno = EPIPE;
            fail("record", setting("line"));
        }
        if (request == FRAME_SERVICE)
            start_service();
        stop = stop || request == FRAME_STOP || (service_ended && strcmp(setting("end"), "1") == 0);
        if (stop)
            power_off();
    }
}
