//! Network namespaces: opening them, telling them apart, and doing something inside one.
//!
//! What is done inside is left to the caller; sockets made there stay there, whatever the thread does next.
#![allow(unsafe_code)]
use std::{
    cell::Cell,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    process,
};

pub use marline_common::NetnsCookie;
use nix::{
    sched::{CloneFlags, setns},
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

/// An open network namespace. It lives on as long as this does, also when its last process and its name are gone.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: PathBuf,
    cookie: NetnsCookie,
}

impl Netns {
    /// Opens the namespace at a path such as `/run/netns/NAME` or `/proc/PID/ns/net`.
    pub fn open(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        let file = File::open(&path)?;
        let cookie = inside(&file, own_cookie)??;
        Ok(Self { file, path, cookie })
    }

    /// The namespace that the calling thread is in.
    pub fn current() -> io::Result<Self> {
        Self::open("/proc/thread-self/ns/net")
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn cookie(&self) -> NetnsCookie {
        self.cookie
    }

    /// By which it is told from all others that there are at the same time, and those that are open.
    pub fn inode(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.ino())
    }

    /// Whether a path leads here. It costs less than to open what is there.
    pub fn is_at(&self, path: &Path) -> io::Result<bool> {
        let (there, here) = (fs::metadata(path)?, self.file.metadata()?);
        Ok((there.dev(), there.ino()) == (here.dev(), here.ino()))
    }

    /// Runs `f` with the calling thread inside the namespace and brings the thread back. `f` must not await.
    ///
    /// A thread that cannot come back would make sockets in the wrong place: the process ends instead.
    pub fn run<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        inside(&self.file, f)
    }

    /// Moves the calling thread into the namespace for good.
    pub fn enter(&self) -> io::Result<()> {
        setns(&self.file, CloneFlags::CLONE_NEWNET)?;
        HOME.set(None);
        Ok(())
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Whether opening a namespace has failed because there is none at the path: nothing, or the empty file that one was mounted on. Whatever else
/// fails, as where descriptors have run out, says nothing of it.
pub fn leads_nowhere(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ESRCH | libc::EINVAL))
}

/// The libc crate does not have it yet; the same number on every architecture but sparc and parisc.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// The namespace that a socket belongs to.
pub fn socket_netns(socket: BorrowedFd<'_>) -> io::Result<NetnsCookie> {
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the descriptor is open for the call, and the kernel writes at most `length` bytes to `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(NetnsCookie(cookie)) } else { Err(io::Error::last_os_error()) }
}

fn own_cookie() -> io::Result<NetnsCookie> {
    // Any socket will do.
    let (family, kind) = (AddressFamily::Unix, SockType::Datagram);
    let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
    socket_netns(socket.as_fd())
}

thread_local! {
    /// Where this thread lives, so that it need not ask at each connection; nothing while it is away.
    static HOME: Cell<Option<File>> = const { Cell::new(None) };
}

fn inside<T>(namespace: &File, f: impl FnOnce() -> T) -> io::Result<T> {
    // A thread that is away already comes back to where it is now.
    let home = match HOME.take() {
        Some(home) => home,
        None => File::open("/proc/thread-self/ns/net")?,
    };
    let away = Away(Some(home));
    setns(namespace, CloneFlags::CLONE_NEWNET)?;
    let result = f();
    drop(away);
    Ok(result)
}

struct Away(Option<File>);

impl Drop for Away {
    fn drop(&mut self) {
        let Some(home) = self.0.take() else { return };
        if let Err(error) = setns(&home, CloneFlags::CLONE_NEWNET) {
            tracing::error!(%error, "cannot return to the agent's network namespace");
            process::abort();
        }
        HOME.set(Some(home));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_has_the_same_cookie_however_it_is_opened() {
        let by_thread = Netns::current().unwrap();
        let by_process = Netns::open("/proc/self/ns/net").unwrap();
        assert_eq!(by_thread.cookie(), by_process.cookie());
        assert_eq!(by_thread.run(own_cookie).unwrap().unwrap(), by_thread.cookie());
        assert!(by_thread.is_at(Path::new("/proc/self/ns/net")).unwrap());
        assert_eq!(by_thread.inode().unwrap(), by_process.inode().unwrap());
    }

    #[test]
    fn what_is_no_namespace_is_an_error_and_the_thread_stays() {
        let before = Netns::current().unwrap().cookie();
        assert!(Netns::open("/dev/null").is_err());
        assert!(!Netns::current().unwrap().is_at(Path::new("/dev/null")).unwrap());
        assert!(Netns::current().unwrap().is_at(Path::new("/nowhere/at/all")).is_err());
        assert_eq!(Netns::current().unwrap().cookie(), before);
    }
}
