//! Pipes and splice(2). A pipe is borrowed from a small per-thread store while bytes are in flight and given back empty, so
//! that an idle connection holds none.
#![allow(unsafe_code)]

use std::{
    cell::RefCell,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// What a pipe is asked to hold. 16 buffers are the kernel's default; a pipe that the kernel will not enlarge still works.
const PIPE_BYTES: libc::c_int = 256 << 10;
/// Pipes kept per thread; more are closed.
const KEPT: usize = 16;

thread_local! {
    static STORE: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

/// A pipe that knows how much it holds. Dropped empty it returns to the store; dropped with bytes in it, it is closed.
pub struct Pipe {
    ends: Option<(OwnedFd, OwnedFd)>,
    held: usize,
}

impl Pipe {
    pub fn take() -> io::Result<Self> {
        if let Some(pipe) = STORE.with_borrow_mut(Vec::pop) {
            return Ok(pipe);
        }
        let (read, write) = nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        // Refused beyond /proc/sys/fs/pipe-user-pages-soft: the default size then serves.
        let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
        Ok(Self { ends: Some((read, write)), held: 0 })
    }

    pub fn is_empty(&self) -> bool {
        self.held == 0
    }

    /// Moves what is queued on `source` into the empty pipe. 0 is the end of the stream or, from a kernel TLS socket, an empty
    /// record; EINVAL from one means that a control record is next.
    pub fn fill(&mut self, source: impl AsFd) -> io::Result<usize> {
        debug_assert!(self.is_empty(), "bytes of two reads must not mix");
        let Some((_, write)) = &self.ends else { return Err(closed()) };
        let moved = splice(source, write, PIPE_BYTES as usize)?;
        self.held = moved;
        Ok(moved)
    }

    /// Moves what the pipe holds to `sink`, as far as it takes it now. Exactly what is held is asked for: with more, the
    /// kernel sets MSG_MORE and kernel TLS keeps the bytes back.
    pub fn drain(&mut self, sink: impl AsFd) -> io::Result<usize> {
        let Some((read, _)) = &self.ends else { return Err(closed()) };
        let moved = splice(read, sink, self.held)?;
        self.held -= moved.min(self.held);
        Ok(moved)
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        if self.held > 0 {
            return;
        }
        if let Some(ends) = self.ends.take() {
            // Fails only while the thread is ending: then the pipe is closed.
            let _ = STORE.try_with(|store| {
                let mut store = store.borrow_mut();
                if store.len() < KEPT {
                    store.push(Pipe { ends: Some(ends), held: 0 });
                }
            });
        }
    }
}

fn splice(from: impl AsFd, to: impl AsFd, len: usize) -> io::Result<usize> {
    // SAFETY: no offsets are given; both descriptors are borrowed for the call.
    let moved = unsafe {
        libc::splice(
            from.as_fd().as_raw_fd(),
            std::ptr::null_mut(),
            to.as_fd().as_raw_fd(),
            std::ptr::null_mut(),
            len,
            libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK,
        )
    };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

fn closed() -> io::Error {
    io::Error::from(io::ErrorKind::BrokenPipe)
}
