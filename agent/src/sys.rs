//! Socket and kernel calls, behind safe functions.
pub mod cgroup;
pub mod clock;
pub mod diag;
pub mod links;
pub mod memory;
pub mod netns;
pub mod options;
pub mod packet;
pub mod pass;
pub mod process;
pub mod seccomp;
pub mod slots;
pub mod socket;
pub mod splice;
pub mod tcp_info;
pub mod unsent;
pub mod vital;
pub mod wakeup;
pub mod watched;

/// The kernel's, as `uname -r` prints it.
pub fn release() -> String {
    nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default()
}
