//! Whether a pinned link of a kernel program is attached to anything: somebody may have detached it, or what it hung on may be gone. The
//! link stays then, and does nothing. What should be attached is `bpf`'s to know.
#![allow(unsafe_code)]
use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

const BPF_OBJ_GET: libc::c_int = 7;

/// The part of `union bpf_attr` that BPF_OBJ_GET reads.
#[repr(C)]
struct ObjGet {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// An error if there is no link at the path.
pub fn is_attached(pin: &Path) -> io::Result<bool> {
    let link = open(pin)?;
    Ok(names_a_target(&fs::read_to_string(format!("/proc/self/fdinfo/{}", link.as_raw_fd()))?))
}

fn open(pin: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let attributes = ObjGet { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: the kernel reads `size_of::<ObjGet>()` bytes of the attributes and a string that ends with 0; both live until it returns.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const attributes, size_of::<ObjGet>() as libc::c_uint)
    };
    let fd = libc::c_int::try_from(result).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A link to a cgroup or a network namespace names it; one that was detached names 0.
fn names_a_target(info: &str) -> bool {
    let target = info.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        ["cgroup_id", "netns_ino"].contains(&key).then_some(value.trim())
    });
    target.is_some_and(|target| target != "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_attached_if_it_names_what_it_hangs_on() {
        let info = |target: &str| format!("pos:\t0\nlink_type:\tcgroup\nlink_id:\t7\nprog_id:\t9\n{target}\n");
        for (target, attached) in [
            ("cgroup_id:\t4711", true),
            ("cgroup_id:\t0", false),
            ("netns_ino:\t4026531840", true),
            ("netns_ino:\t0", false),
            ("something:\t1", false),
        ] {
            assert_eq!(names_a_target(&info(target)), attached, "{target}");
        }
    }

    #[test]
    fn what_is_not_pinned_is_an_error() {
        assert!(is_attached(Path::new("/proc/self/nothing")).is_err());
        assert!(is_attached(Path::new("/proc/self/status")).is_err());
    }
}
