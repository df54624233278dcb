//! The process behind a held call: its descriptors and its memory.
//!
//! A thread id can be another thread's by the time it is used. So: make the [`Caller`], then ask the listener whether the
//! notification is still valid; if it is, the caller was waiting all the while, and everything done through this value from
//! then on concerns its process and no other. [`peek`] is for a look before that, and its result worth nothing unless the
//! notification is valid afterwards.
#![allow(unsafe_code)]

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::fs::FileExt,
    },
};

/// `PIDFD_THREAD` (include/uapi/linux/pidfd.h), since 6.9: a pidfd of one thread, whose table of descriptors is then used.
const PIDFD_THREAD: libc::c_uint = libc::O_EXCL as libc::c_uint;
/// `KCMP_FILES` (include/uapi/linux/kcmp.h).
const KCMP_FILES: libc::c_long = 2;

/// A thread's process, pinned.
#[derive(Debug)]
pub struct Caller {
    tid: u32,
    pidfd: OwnedFd,
    memory: File,
}

impl Caller {
    /// Opens the process of a thread. The thread group's leader may be dead already, or have other descriptors than the
    /// thread: then the thread itself is opened, where the kernel can, and else the call fails with `Unsupported`.
    pub fn of(tid: u32) -> io::Result<Self> {
        let pidfd = match pidfd_open(tid, PIDFD_THREAD) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => group(tid)?,
            opened => opened?,
        };
        let memory = File::options().read(true).write(true).open(format!("/proc/{tid}/mem"))?;
        Ok(Self { tid, pidfd, memory })
    }

    /// A duplicate of one of the process's descriptors.
    pub fn descriptor(&self, fd: i32) -> io::Result<OwnedFd> {
        duplicate(&self.pidfd, fd)
    }

    /// Reads up to `length` bytes; fewer come back only where the memory ends.
    pub fn read(&self, address: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        let mut have = 0;
        while have < length {
            match self.memory.read_at(&mut bytes[have..], place(address, have)?) {
                Ok(0) => break,
                Ok(count) => have += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) if have > 0 => break,
                Err(error) => return Err(fault(error)),
            }
        }
        bytes.truncate(have);
        Ok(bytes)
    }

    /// Writes all of `data`.
    pub fn write(&self, address: u64, data: &[u8]) -> io::Result<()> {
        place(address, data.len())?;
        self.memory.write_all_at(data, address).map_err(fault)
    }

    pub fn tid(&self) -> u32 {
        self.tid
    }

    /// The process (the thread group) in this process's pid namespace.
    pub fn pid(&self) -> io::Result<u32> {
        number(self.tid, "Tgid:", 10).and_then(|pid| u32::try_from(pid).map_err(io::Error::other))
    }

    /// Readable when the thread (before 6.9: its process) has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Whether a signal that the thread does not block is waiting to be delivered: were the thread not held, its call would
    /// be interrupted.
    pub fn interrupted(&self) -> io::Result<bool> {
        interrupted(self.tid)
    }
}

/// As [`Caller::interrupted`]. Another thread of the process may yet take the signal.
pub fn interrupted(tid: u32) -> io::Result<bool> {
    let status = fs::read_to_string(format!("/proc/{tid}/status"))?;
    let set = |field| field_of(&status, field, 16);
    Ok((set("SigPnd:")? | set("ShdPnd:")?) & !set("SigBlk:")? != 0)
}

/// A duplicate of a socket that some process has among its descriptors, by its inode. Looks through all processes.
pub fn holding(inode: u32) -> io::Result<OwnedFd> {
    let name = format!("socket:[{inode}]");
    for process in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // One that ends meanwhile has none.
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else { continue };
        for descriptor in descriptors.flatten() {
            if fs::read_link(descriptor.path()).is_ok_and(|link| link.as_os_str() == name.as_str())
                && let Some(fd) = descriptor.file_name().to_str().and_then(|name| name.parse().ok())
                && let Ok(socket) = pidfd_open(pid, 0).and_then(|pidfd| duplicate(&pidfd, fd))
            {
                return Ok(socket);
            }
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

fn duplicate(pidfd: &OwnedFd, fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes numbers only.
    let taken = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    owned(taken)
}

/// Reads from a thread's memory without opening its process, and gives how much it read. For a cheap first look.
pub fn peek(tid: u32, address: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let tid = i32::try_from(tid).map_err(io::Error::other)?;
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let start = usize::try_from(address).map_err(io::Error::other)?;
    let remote = libc::iovec { iov_base: std::ptr::without_provenance_mut(start), iov_len: buffer.len() };
    // SAFETY: the local range is `buffer`'s; the remote one is judged by the kernel.
    let count = unsafe { libc::process_vm_readv(tid, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// The thread group, if it stands for the thread: a group's descriptors are its leader's, and a leader that has ended has none.
fn group(tid: u32) -> io::Result<OwnedFd> {
    let leader = u32::try_from(number(tid, "Tgid:", 10)?).map_err(io::Error::other)?;
    if leader != tid {
        // SAFETY: with KCMP_FILES the call takes numbers only.
        let differ = unsafe { libc::syscall(libc::SYS_kcmp, leader, tid, KCMP_FILES, 0, 0) };
        match differ {
            0 => {}
            ..0 => return Err(io::Error::last_os_error()),
            1.. => {
                let text = "the thread's descriptors are not its process's";
                return Err(io::Error::new(io::ErrorKind::Unsupported, text));
            }
        }
    }
    pidfd_open(leader, 0)
}

fn pidfd_open(pid: u32, flags: libc::c_uint) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes numbers only.
    let opened = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags) };
    owned(opened)
}

fn owned(descriptor: libc::c_long) -> io::Result<OwnedFd> {
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    let descriptor = i32::try_from(descriptor).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us, close-on-exec, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn number(tid: u32, field: &str, radix: u32) -> io::Result<u64> {
    field_of(&fs::read_to_string(format!("/proc/{tid}/status"))?, field, radix)
}

/// A number out of /proc/PID/status.
fn field_of(status: &str, field: &str, radix: u32) -> io::Result<u64> {
    let text = status.lines().find_map(|line| line.strip_prefix(field));
    let value = text.and_then(|text| u64::from_str_radix(text.trim(), radix).ok());
    value.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("no {field} in the status")))
}

/// An offset into the memory file, which the kernel takes as signed: user space ends before that.
fn place(address: u64, offset: usize) -> io::Result<u64> {
    let end = address.checked_add(offset as u64).filter(|end| i64::try_from(*end).is_ok());
    end.ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))
}

/// What the kernel reports as EIO for memory that is not there would be EFAULT to the caller itself.
fn fault(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EIO) => io::Error::from_raw_os_error(libc::EFAULT),
        _ => error,
    }
}
