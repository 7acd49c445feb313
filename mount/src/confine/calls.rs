//! System calls a door needs. Everything else fails with `EPERM`.
//!
//! Invariants
//! - No program is started, nothing is mounted, no other process is looked into or signalled.
//! - Threads can be made, processes cannot: `clone3`, whose flags a filter cannot see, is "not there",
//!   so the C library falls back to `clone`, whose flags it can.

use std::collections::BTreeMap;

use aquifer_vdisk::YIELDING;
use libc as c;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// Allowed whatever their arguments are.
const PLAIN: &[c::c_long] = &[
    // bytes
    c::SYS_read,
    c::SYS_write,
    c::SYS_readv,
    c::SYS_writev,
    c::SYS_pread64,
    c::SYS_pwrite64,
    c::SYS_preadv,
    c::SYS_pwritev,
    c::SYS_preadv2,
    c::SYS_pwritev2,
    c::SYS_lseek,
    c::SYS_fsync,
    c::SYS_fdatasync,
    c::SYS_sync_file_range,
    c::SYS_fallocate,
    c::SYS_ftruncate,
    c::SYS_fadvise64,
    c::SYS_copy_file_range,
    c::SYS_sendfile,
    // files; Landlock says which
    c::SYS_openat,
    c::SYS_openat2,
    c::SYS_close,
    c::SYS_close_range,
    c::SYS_fstat,
    c::SYS_newfstatat,
    c::SYS_statx,
    c::SYS_statfs,
    c::SYS_fstatfs,
    c::SYS_flock,
    c::SYS_fcntl,
    c::SYS_dup,
    c::SYS_dup3,
    c::SYS_pipe2,
    c::SYS_getdents64,
    c::SYS_mkdirat,
    c::SYS_unlinkat,
    c::SYS_renameat,
    c::SYS_renameat2,
    c::SYS_linkat,
    c::SYS_readlinkat,
    c::SYS_faccessat,
    c::SYS_faccessat2,
    c::SYS_fchmod,
    c::SYS_fchmodat,
    c::SYS_utimensat,
    c::SYS_umask,
    c::SYS_getcwd,
    // memory
    c::SYS_mmap,
    c::SYS_munmap,
    c::SYS_mprotect,
    c::SYS_mremap,
    c::SYS_madvise,
    c::SYS_brk,
    c::SYS_mincore,
    c::SYS_mlock,
    c::SYS_munlock,
    c::SYS_membarrier,
    // threads and their end
    c::SYS_futex,
    c::SYS_set_robust_list,
    c::SYS_get_robust_list,
    c::SYS_rseq,
    c::SYS_set_tid_address,
    c::SYS_sched_yield,
    c::SYS_sched_getaffinity,
    c::SYS_gettid,
    c::SYS_getpid,
    c::SYS_getppid,
    c::SYS_exit,
    c::SYS_exit_group,
    c::SYS_restart_syscall,
    c::SYS_rt_sigaction,
    c::SYS_rt_sigprocmask,
    c::SYS_rt_sigreturn,
    c::SYS_rt_sigtimedwait,
    c::SYS_sigaltstack,
    // An abort signals its own thread; Landlock keeps signals inside.
    c::SYS_tgkill,
    c::SYS_pidfd_open,
    // time and self-knowledge
    c::SYS_clock_gettime,
    c::SYS_clock_getres,
    c::SYS_clock_nanosleep,
    c::SYS_nanosleep,
    c::SYS_gettimeofday,
    c::SYS_getrandom,
    c::SYS_uname,
    c::SYS_sysinfo,
    c::SYS_getrusage,
    c::SYS_prlimit64,
    c::SYS_getuid,
    c::SYS_geteuid,
    c::SYS_getgid,
    c::SYS_getegid,
    c::SYS_capget,
    // sockets, once made
    c::SYS_socketpair,
    c::SYS_connect,
    c::SYS_accept,
    c::SYS_accept4,
    c::SYS_bind,
    c::SYS_listen,
    c::SYS_getsockname,
    c::SYS_getpeername,
    c::SYS_getsockopt,
    c::SYS_setsockopt,
    c::SYS_shutdown,
    c::SYS_sendto,
    c::SYS_recvfrom,
    c::SYS_sendmsg,
    c::SYS_recvmsg,
    c::SYS_sendmmsg,
    c::SYS_ppoll,
    c::SYS_pselect6,
    c::SYS_epoll_create1,
    c::SYS_epoll_ctl,
    c::SYS_epoll_pwait,
    c::SYS_eventfd2,
    // absent by the other filter, so that the C library uses `clone`
    c::SYS_clone3,
];

/// Older names of the same, which this architecture's C library still uses.
#[cfg(target_arch = "x86_64")]
const OLDER: &[c::c_long] = &[
    c::SYS_open,
    c::SYS_stat,
    c::SYS_lstat,
    c::SYS_access,
    c::SYS_readlink,
    c::SYS_mkdir,
    c::SYS_rmdir,
    c::SYS_unlink,
    c::SYS_rename,
    c::SYS_link,
    c::SYS_chmod,
    c::SYS_dup2,
    c::SYS_poll,
    c::SYS_epoll_wait,
    c::SYS_time,
    c::SYS_arch_prctl,
];

#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[c::c_long] = &[];

/// Of what is asked of devices: FUSE passthrough, sizes of block devices, sockets, terminals' being one.
const DEVICE_REQUESTS: &[u64] = &[
    0x8004_e500, // FUSE_DEV_IOC_CLONE
    0x4010_e501, // FUSE_DEV_IOC_BACKING_OPEN
    0x4004_e502, // FUSE_DEV_IOC_BACKING_CLOSE
    0x8008_1272, // BLKGETSIZE64
    0x1268,      // BLKSSZGET
    0x541B,      // FIONREAD
    0x5421,      // FIONBIO
    0x5401,      // TCGETS
    0x5451,      // FIOCLEX
];

/// Puts the filter over the calling thread.
pub(super) fn filter() -> Result<(), String> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|e| e.to_string())?;
    let no_clone3 = SeccompFilter::new(
        BTreeMap::from([(c::SYS_clone3, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(c::ENOSYS.unsigned_abs()),
        arch,
    );
    let allowed = SeccompFilter::new(
        rules().map_err(|e| e.to_string())?,
        SeccompAction::Errno(c::EPERM.unsigned_abs()),
        SeccompAction::Allow,
        arch,
    );
    for filter in [no_clone3, allowed] {
        let program: BpfProgram = filter.and_then(TryInto::try_into).map_err(|e| e.to_string())?;
        seccompiler::apply_filter(&program).map_err(|e| e.to_string())?;
    }
    Ok(())
}

fn rules() -> Result<BTreeMap<c::c_long, Vec<SeccompRule>>, seccompiler::BackendError> {
    let mut out: BTreeMap<_, Vec<SeccompRule>> = PLAIN.iter().chain(OLDER).map(|call| (*call, Vec::new())).collect();
    out.insert(c::SYS_ioctl, any_of(1, DEVICE_REQUESTS)?);
    let families = [c::AF_UNIX, c::AF_INET, c::AF_INET6];
    out.insert(c::SYS_socket, any_of(0, &families.map(|f| u64::from(f.unsigned_abs())))?);
    // Names of threads, and of memory in the kernel's listings.
    out.insert(c::SYS_prctl, any_of(0, &[u64::from(c::PR_SET_NAME.unsigned_abs()), 0x5356_4d41])?);
    // A thread that copies may step back behind those that serve, and none may do more than that.
    let own = |argument, value| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value);
    let back = own(2, u64::from(YIELDING.unsigned_abs()))?;
    let steps_back = SeccompRule::new(vec![own(0, u64::from(c::PRIO_PROCESS))?, own(1, 0)?, back])?;
    out.insert(c::SYS_setpriority, vec![steps_back]);
    // Whether a process is there.
    out.insert(c::SYS_kill, any_of(1, &[0])?);
    let thread = u64::from(c::CLONE_THREAD.unsigned_abs());
    let makes_thread = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(thread), thread)?;
    out.insert(c::SYS_clone, vec![SeccompRule::new(vec![makes_thread])?]);
    Ok(out)
}

/// The call's argument is one of `values`.
fn any_of(argument: u8, values: &[u64]) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let rule = |value: &u64| {
        let is = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value)?;
        SeccompRule::new(vec![is])
    };
    values.iter().map(rule).collect()
}
