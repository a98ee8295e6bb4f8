"""The system calls that a sandbox may make.

Pure. Everything else fails with EPERM. The set is that of Docker's default profile for a container without
CAP_SYS_ADMIN (https://docs.docker.com/engine/security/seccomp/), less io_uring, kernel AF_ALG crypto and VM sockets.
In particular no namespaces, mounts, keyrings, BPF, performance counters, modules, clocks or file handles. Programs for
the machine's 32-bit mode are killed: their calls would be a second way into the kernel, and a sixth of a start's time.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

FILES = """
    access chdir chmod chown chown32 close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2
    fadvise64 fadvise64_64 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64
    fdatasync fgetxattr flistxattr flock fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync
    ftruncate ftruncate64 futimesat getcwd getdents getdents64 getxattr ioctl lchown lchown32 lgetxattr link linkat
    listxattr llistxattr _llseek lremovexattr lseek lsetxattr lstat lstat64 mkdir mkdirat mknod mknodat
    name_to_handle_at newfstatat open openat openat2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead
    readlink readlinkat readv removexattr rename renameat renameat2 rmdir sendfile sendfile64 setxattr splice stat
    stat64 statfs statfs64 statx symlink symlinkat sync sync_file_range syncfs tee truncate truncate64 umask unlink
    unlinkat utime utimensat utimensat_time64 utimes vmsplice write writev chroot cachestat getxattrat listxattrat
    removexattrat setxattrat listmount statmount
"""
EVENTS = """
    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd
    eventfd2 fanotify_mark inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy
    io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit _newselect pipe pipe2 poll ppoll ppoll_time64
    pselect6 pselect6_time64 select signalfd signalfd4 timerfd_create timerfd_gettime timerfd_gettime64
    timerfd_settime timerfd_settime64
"""
MEMORY = """
    brk madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap mmap2
    mprotect mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect process_mrelease
    remap_file_pages
"""
MESSAGES = """
    accept accept4 bind connect getpeername getsockname getsockopt ipc listen mq_getsetattr mq_notify mq_open
    mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink msgctl msgget msgrcv msgsnd
    recv recvfrom recvmmsg recvmmsg_time64 recvmsg semctl semget semop semtimedop semtimedop_time64 send sendmmsg
    sendmsg sendto setsockopt shmat shmctl shmdt shmget shutdown socketcall socketpair
"""
PROCESSES = """
    alarm capget capset execve execveat exit exit_group fork futex futex_requeue futex_time64 futex_wait futex_waitv
    futex_wake get_robust_list get_thread_area getcpu getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups
    getgroups32 getitimer getpgid getpgrp getpid getppid getpriority getresgid getresgid32 getresuid getresuid32
    getrlimit getrusage getsid gettid getuid getuid32 ioprio_get ioprio_set kill landlock_add_rule
    landlock_create_ruleset landlock_restrict_self pause pidfd_open pidfd_send_signal prctl prlimit64
    process_vm_readv process_vm_writev ptrace restart_syscall rseq rt_sigaction rt_sigpending rt_sigprocmask
    rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo
    sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler
    sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam
    sched_setscheduler sched_yield seccomp set_robust_list set_thread_area set_tid_address setfsgid setfsgid32
    setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setitimer setpgid setpriority setregid setregid32
    setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit setsid setuid setuid32 sigaltstack
    sigprocmask sigreturn tgkill tkill ugetrlimit vfork wait4 waitid waitpid
"""
TIME_AND_MACHINE = """
    adjtimex clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64
    clock_nanosleep clock_nanosleep_time64 getrandom gettimeofday nanosleep sysinfo time timer_create timer_delete
    timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 times uname
"""
MACHINES = {
    "x86_64": (["SCMP_ARCH_X86_64"], "arch_prctl modify_ldt"),
    "aarch64": (
        ["SCMP_ARCH_AARCH64"],
        "arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2",
    ),
}
AF_ALG, AF_VSOCK = 38, 40
ENOSYS = 38
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET: sched.h
NAMESPACES = 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000
# The default, PER_LINUX32, UNAME26, both, and "tell me": personality(2)
PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)


@functools.cache
def profile(machine: str = platform.machine()) -> dict[str, Any]:
    """`linux.seccomp` of the OCI runtime specification for this kind of machine, as uname(2) calls it."""
    architectures, special = MACHINES.get(machine, ([], ""))
    names = " ".join((FILES, EVENTS, MEMORY, MESSAGES, PROCESSES, TIME_AND_MACHINE, special)).split()
    allow = {"action": "SCMP_ACT_ALLOW"}
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": architectures,
        "syscalls": [
            {"names": sorted(names), **allow},
            {"names": ["socket"], **allow, "args": [_arg(0, AF_ALG, "LT")]},
            {"names": ["socket"], **allow, "args": [_arg(0, AF_ALG + 1, "EQ")]},
            {"names": ["socket"], **allow, "args": [_arg(0, AF_VSOCK, "GT")]},
            *({"names": ["personality"], **allow, "args": [_arg(0, value, "EQ")]} for value in PERSONALITIES),
            # Its flags are behind a pointer, where no filter can look; C libraries fall back to clone.
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS},
            {"names": ["clone"], **allow, "args": [{**_arg(0, NAMESPACES, "MASKED_EQ"), "valueTwo": 0}]},
        ],
    }


def _arg(index: int, value: int, operator: str) -> dict[str, Any]:
    return {"index": index, "value": value, "op": f"SCMP_CMP_{operator}"}
