"""The system calls that a sandbox may make.

Pure. Everything else fails with EPERM. The set is that of Docker's default profile
(https://github.com/moby/profiles, seccomp/default.json, of 2025) for a container with CAPABILITIES: in particular no
namespaces, mounts, keyrings, BPF, performance counters, io_uring, modules, clocks or file handles. Every difference:

- NUMA below is allowed, which Docker gives with CAP_SYS_NICE: libraries for GPUs and `numactl` place a process's own
  memory by it. Other processes' memory, `migrate_pages` and `move_pages`, stays shut.
- `personality` takes ADDR_NO_RANDOMIZE too: gdb and `setarch -R` start their own program so.
- Programs for the machine's 32-bit mode are killed: their calls would be a second way into the kernel, and a sixth of a
  start's time.
- Calls that no machine of ours has (POWER, s390, RISC-V) are not listed.
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
    restart_syscall rseq rt_sigaction rt_sigpending rt_sigprocmask
    rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo
    sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler
    sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam
    sched_setscheduler sched_yield seccomp set_robust_list set_thread_area set_tid_address setfsgid setfsgid32
    setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setitimer setpgid setpriority setregid setregid32
    setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit setsid setuid setuid32 sigaltstack
    sigprocmask sigreturn tgkill tkill ugetrlimit uretprobe vfork wait4 waitid waitpid
"""
# With CAP_SYS_PTRACE, which is of the sandbox's user namespace: the kernel refuses processes of any other.
DEBUGGERS = "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace"
NUMA = "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"
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
# Kinds of sockets: those below 12, and these. Not among them: DECnet, Econet, ATM, IrDA, WANPIPE, IUCV, CAIF, the
# kernel's cryptography (AF_ALG) and sockets of virtual machines (AF_VSOCK), whose modules the kernel would load.
BELOW = 12
FAMILIES = [13, 14, 15, 16, 17, 18, 21, 22, 24, *range(26, 34), 35, 36, 39, *range(41, 46)]
ENOSYS = 38
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET: sched.h
NAMESPACES = 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000
# The default, PER_LINUX32, UNAME26, both, ADDR_NO_RANDOMIZE, and "tell me": personality(2)
PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0x40000, 0xFFFFFFFF)


@functools.cache
def profile(machine: str = platform.machine()) -> dict[str, Any]:
    """`linux.seccomp` of the OCI runtime specification for this kind of machine, as uname(2) calls it."""
    architectures, special = MACHINES.get(machine, ([], ""))
    names = " ".join((FILES, EVENTS, MEMORY, MESSAGES, PROCESSES, DEBUGGERS, NUMA, TIME_AND_MACHINE, special)).split()
    allow = {"action": "SCMP_ACT_ALLOW"}
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": architectures,
        "syscalls": [
            {"names": sorted(names), **allow},
            {"names": ["socket"], **allow, "args": [_arg(0, BELOW, "LT")]},
            *({"names": ["socket"], **allow, "args": [_arg(0, family, "EQ")]} for family in FAMILIES),
            *({"names": ["personality"], **allow, "args": [_arg(0, value, "EQ")]} for value in PERSONALITIES),
            # Its flags are behind a pointer, where no filter can look; C libraries fall back to clone.
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS},
            {"names": ["clone"], **allow, "args": [{**_arg(0, NAMESPACES, "MASKED_EQ"), "valueTwo": 0}]},
        ],
    }


def _arg(index: int, value: int, operator: str) -> dict[str, Any]:
    return {"index": index, "value": value, "op": f"SCMP_CMP_{operator}"}
