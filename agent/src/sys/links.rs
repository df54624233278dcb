//! What the kernel says of a pinned BPF link at this moment: which program it holds, and whether it is attached to anything still. Links
//! outlive their attachment: a cgroup that is removed, or somebody who detaches them, leaves them in place and without effect.
#![allow(unsafe_code)]
use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

/// Of include/uapi/linux/bpf.h.
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_TYPE_CGROUP: u32 = 3;
const BPF_LINK_TYPE_NETNS: u32 = 5;

/// A link that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkFacts {
    pub program: u32,
    /// The inode of the cgroup or of the network namespace that it is attached to; `None` if it is attached to nothing.
    pub target: Option<u64>,
}

#[repr(C)]
#[derive(Default)]
struct ObjGet {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct InfoByFd {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The head of `struct bpf_link_info`. Of a cgroup's link `target` is the cgroup's id; of a namespace's, its lower half is the inode.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    padding: u32,
    target: u64,
    rest: [u64; 8],
}

/// The link pinned at `path`.
pub fn pinned(path: &Path) -> io::Result<LinkFacts> {
    let link = open(path)?;
    let mut info = LinkInfo::default();
    let attr = InfoByFd {
        bpf_fd: u32::try_from(link.as_raw_fd()).map_err(io::Error::other)?,
        info_len: u32::try_from(size_of::<LinkInfo>()).map_err(io::Error::other)?,
        info: (&raw mut info).expose_provenance() as u64,
    };
    // SAFETY: `attr` is what this command reads; the kernel writes at most `info_len` bytes to `info`, which outlives the call.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &raw const attr) }?;
    let target = match info.kind {
        BPF_LINK_TYPE_CGROUP => info.target,
        BPF_LINK_TYPE_NETNS => info.target & u64::from(u32::MAX),
        other => return Err(io::Error::other(format!("it is a link of another kind ({other})"))),
    };
    Ok(LinkFacts { program: info.program, target: (target != 0).then_some(target) })
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attr = ObjGet { pathname: path.as_ptr().expose_provenance() as u64, ..ObjGet::default() };
    // SAFETY: `attr` is what this command reads; the path ends with a zero and outlives the call.
    let descriptor = unsafe { bpf(BPF_OBJ_GET, &raw const attr) }?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(descriptor).map_err(io::Error::other)?) })
}

/// # Safety
/// `attr` must be what the command wants, and what it points to must outlive the call.
unsafe fn bpf<T>(command: libc::c_long, attr: *const T) -> io::Result<libc::c_long> {
    // SAFETY: by the caller's word.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_link_is_an_error() {
        assert!(pinned(Path::new("/dev/null")).is_err());
        assert!(pinned(Path::new("/nowhere/at/all")).is_err());
    }
}
