//! The seccomp filter that sends connect, accept and whatever ends a socket to whoever holds its notify descriptor, and that descriptor.
//!
//! What the answers are is the holder's matter. Only one process may receive from a descriptor at a time: the kernel's
//! receive waits, and of two that saw the same notification one would wait for the next.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::Path,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::slots::Slot;

/// Calls from here on are x32's (arch/x86/include/uapi/asm/unistd.h).
#[cfg(target_arch = "x86_64")]
const X32: u32 = 0x4000_0000;
#[cfg(target_arch = "x86_64")]
const NATIVE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const NATIVE: u32 = 0xc000_00b7;

/// What a descriptor of this kind is called in /proc/PID/fd.
const KIND: &str = "anon_inode:seccomp notify";

/// Puts the calling thread, and all that it will start, under the filter. Every other call is allowed, which the kernel knows
/// beforehand and does not ask the filter for; so are calls by another entry (x32, i386), whose connections are redirected as
/// ever. From now on this thread's own connect waits for whoever receives.
///
/// Without CAP_SYS_ADMIN the thread gives up gaining privileges by exec, as the kernel wants it.
pub fn install() -> io::Result<OwnedFd> {
    let filter = filter();
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(io::Error::other)?,
        filter: filter.as_ptr().cast_mut(),
    };
    match load(&program) {
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
            nix::sys::prctl::set_no_new_privs()?;
            load(&program)
        }
        loaded => loaded,
    }
}

/// A held system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notification {
    pub id: u64,
    /// The calling thread in this process's pid namespace; 0 if it cannot be seen from here.
    pub tid: u32,
    pub call: Call,
}

/// The call with its arguments, as the caller's memory and descriptors have them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Connect {
        fd: i32,
        address: u64,
        length: u32,
    },
    /// `accept` is `accept4` without flags.
    Accept {
        fd: i32,
        address: u64,
        length: u64,
        flags: i32,
    },
    Listen {
        fd: i32,
    },
    Close {
        fd: i32,
    },
    CloseRange {
        first: u32,
        last: u32,
    },
    Shutdown {
        fd: i32,
        how: i32,
    },
    /// A filter that this project did not write sends other calls, too.
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The kernel carries the call out, with what the caller's memory holds by then.
    Continue,
    Value(i64),
    Errno(i32),
}

/// A notify descriptor.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Listener {
    /// Takes a descriptor from elsewhere, if it is one of this kind.
    pub fn new(descriptor: OwnedFd) -> io::Result<Self> {
        let kind = std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))?;
        if kind != Path::new(KIND) {
            let text = format!("{} instead of a seccomp notify descriptor", kind.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok(Self(descriptor))
    }

    /// The next notification, without waiting; none also where the caller died meanwhile.
    pub fn recv(&self) -> io::Result<Option<Notification>> {
        // SAFETY: seccomp_notif is plain data for which all zeroes is a valid value, and what the kernel asks for.
        let mut raw: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: `raw` is zeroed and lives through the call.
        Ok(if unsafe { self.receive(&raw mut raw) }? { Some(Notification::of(&raw)) } else { None })
    }

    /// The same, with the kernel itself writing the notification into memory that outlives this process: there is no moment
    /// at which it was received and stands nowhere.
    pub fn recv_into(&self, slot: &Slot) -> io::Result<Option<Notification>> {
        slot.clear();
        // SAFETY: a slot's place is valid for as long as the slot, and was zeroed just now.
        Ok(if unsafe { self.receive(slot.notification()) }? { slot.read() } else { None })
    }

    /// Whether any task is left under the filter.
    pub fn abandoned(&self) -> io::Result<bool> {
        Ok(self.poll(PollFlags::empty())?.contains(PollFlags::POLLHUP))
    }

    /// Whether calls have been received and not been answered, by whomever.
    pub fn owes(&self) -> io::Result<bool> {
        Ok(self.poll(PollFlags::POLLOUT)?.contains(PollFlags::POLLOUT))
    }

    /// Whether the call is still held: its caller lives and waits. To be asked after the caller's process has been opened or
    /// its memory read, and before what was found there is acted on.
    pub fn valid(&self, id: u64) -> bool {
        // SAFETY: the kernel reads one u64.
        unsafe { request::id_valid(self.0.as_raw_fd(), &raw const id) }.is_ok()
    }

    /// Ends the caller's waiting. False if it does not wait any more.
    pub fn answer(&self, id: u64, answer: Answer) -> io::Result<bool> {
        let (val, error, flags) = match answer {
            Answer::Continue => (0, 0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
            Answer::Value(value) => (value, 0, 0),
            Answer::Errno(errno) => (0, -errno, 0),
        };
        let mut raw = libc::seccomp_notif_resp { id, val, error, flags };
        // SAFETY: `raw` is as the kernel wants it and lives through the call.
        known(unsafe { request::send(self.0.as_raw_fd(), &raw mut raw) })
    }

    /// Puts a duplicate of `fd` among the caller's descriptors and answers with its number. False if the caller does not wait
    /// any more. After an error the caller still waits; what its own limits refuse comes back as EMFILE.
    ///
    /// Waits until the caller has been scheduled: not for a thread that has others to serve.
    pub fn give(&self, id: u64, fd: BorrowedFd<'_>, cloexec: bool) -> io::Result<bool> {
        let raw = libc::seccomp_notif_addfd {
            id,
            flags: libc::SECCOMP_ADDFD_FLAG_SEND as u32,
            srcfd: u32::try_from(fd.as_raw_fd()).map_err(io::Error::other)?,
            newfd: 0,
            newfd_flags: if cloexec { libc::O_CLOEXEC as u32 } else { 0 },
        };
        loop {
            // SAFETY: `raw` is as the kernel wants it and lives through the call.
            match unsafe { request::add_fd(self.0.as_raw_fd(), &raw const raw) } {
                // A signal came before the caller did its part, and nothing has happened.
                Err(nix::errno::Errno::EINTR) => {}
                result => return known(result),
            }
        }
    }

    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// # Safety
    /// `raw` must be valid for writes of a whole `seccomp_notif`, and zeroed.
    unsafe fn receive(&self, raw: *mut libc::seccomp_notif) -> io::Result<bool> {
        // Where nothing is to be received the kernel would wait, in 6.1 even after the last task is gone.
        while self.poll(PollFlags::POLLIN)?.contains(PollFlags::POLLIN) {
            // SAFETY: by this function's contract; a failed call leaves zeroes.
            match unsafe { request::receive(self.0.as_raw_fd(), raw) } {
                // Its caller died, or gave the call up for a signal; or a signal came for us. There may be others.
                Err(nix::errno::Errno::ENOENT | nix::errno::Errno::EINTR) => {}
                result => return result.map(|_| true).map_err(Into::into),
            }
        }
        Ok(false)
    }

    fn poll(&self, events: PollFlags) -> io::Result<PollFlags> {
        let mut asked = [PollFd::new(self.0.as_fd(), events)];
        poll(&mut asked, PollTimeout::ZERO)?;
        Ok(asked[0].revents().unwrap_or(PollFlags::empty()))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

impl Notification {
    pub(super) fn of(raw: &libc::seccomp_notif) -> Self {
        let args = raw.data.args;
        // The kernel takes ints from the lower halves of registers.
        let call = match i64::from(raw.data.nr) {
            libc::SYS_connect if raw.data.arch == NATIVE => {
                Call::Connect { fd: args[0] as i32, address: args[1], length: args[2] as u32 }
            }
            libc::SYS_accept if raw.data.arch == NATIVE => {
                Call::Accept { fd: args[0] as i32, address: args[1], length: args[2], flags: 0 }
            }
            libc::SYS_accept4 if raw.data.arch == NATIVE => {
                Call::Accept { fd: args[0] as i32, address: args[1], length: args[2], flags: args[3] as i32 }
            }
            libc::SYS_listen if raw.data.arch == NATIVE => Call::Listen { fd: args[0] as i32 },
            libc::SYS_close if raw.data.arch == NATIVE => Call::Close { fd: args[0] as i32 },
            libc::SYS_close_range if raw.data.arch == NATIVE => {
                Call::CloseRange { first: args[0] as u32, last: args[1] as u32 }
            }
            libc::SYS_shutdown if raw.data.arch == NATIVE => Call::Shutdown { fd: args[0] as i32, how: args[1] as i32 },
            _ => Call::Other,
        };
        Self { id: raw.id, tid: raw.pid, call }
    }
}

/// The ioctls of a notify descriptor (include/uapi/linux/seccomp.h).
mod request {
    nix::ioctl_readwrite!(receive, b'!', 0, libc::seccomp_notif);
    nix::ioctl_readwrite!(send, b'!', 1, libc::seccomp_notif_resp);
    nix::ioctl_write_ptr!(id_valid, b'!', 2, u64);
    nix::ioctl_write_ptr!(add_fd, b'!', 3, libc::seccomp_notif_addfd);
}

fn load(program: &libc::sock_fprog) -> io::Result<OwnedFd> {
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    // SAFETY: the program and its instructions live through the call, which only reads them.
    let descriptor = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::c_long::from(libc::SECCOMP_SET_MODE_FILTER), flags, &raw const *program)
    };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    let descriptor = i32::try_from(descriptor).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made the descriptor for us, close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// What is held. listen() is, because it tells which family the sockets must be of that accept() gives. Closing is, because kernel TLS loses what a close comes too soon for: see `sys::unsent`. Not the end of a process, which
/// must not depend on anybody: what it has not closed is closed as the kernel does it.
pub const HELD: [libc::c_long; 7] = [
    libc::SYS_connect,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_listen,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_shutdown,
];

impl Call {
    /// Whether the kernel carries it out in any case: nobody waits for an agent with it.
    pub fn goes_on(self) -> bool {
        self.ends_sockets() || matches!(self, Self::Listen { .. })
    }

    /// Whether sockets may end with it, as a whole or one way.
    pub fn ends_sockets(self) -> bool {
        matches!(self, Self::Close { .. } | Self::CloseRange { .. } | Self::Shutdown { .. })
    }
}

/// Loads of `seccomp_data`'s `nr` and `arch`, comparisons with constants and returns alone: what the kernel can work out
/// beforehand for each call.
fn filter() -> Vec<libc::sock_filter> {
    const NR: u32 = 0;
    const ARCH: u32 = 4;
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let load = |offset| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    let give = |what| statement(libc::BPF_RET | libc::BPF_K, what);
    // Over the next instruction, or not.
    let skip_if = |test: u32, k: u32| libc::sock_filter { jt: 1, ..statement(libc::BPF_JMP | test | libc::BPF_K, k) };
    let skip_unless =
        |test: u32, k: u32| libc::sock_filter { jf: 1, ..statement(libc::BPF_JMP | test | libc::BPF_K, k) };
    let mut filter = vec![load(ARCH), skip_if(libc::BPF_JEQ, NATIVE), give(libc::SECCOMP_RET_ALLOW), load(NR)];
    #[cfg(target_arch = "x86_64")]
    filter.extend([skip_unless(libc::BPF_JGE, X32), give(libc::SECCOMP_RET_ALLOW)]);
    for call in HELD {
        filter.extend([skip_unless(libc::BPF_JEQ, call as u32), give(libc::SECCOMP_RET_USER_NOTIF)]);
    }
    filter.push(give(libc::SECCOMP_RET_ALLOW));
    filter
}

/// Whether the caller was there to be answered.
fn known(result: nix::Result<i32>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        // Gone, or answered already.
        Err(nix::errno::Errno::ENOENT | nix::errno::Errno::EINPROGRESS) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
