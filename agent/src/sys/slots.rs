//! Shared memory in which the kernel writes down received notifications, so that a process that outlives this one can read
//! what was received and not answered.
//!
//! A slot holds the number of a notify descriptor, whether work on the call has begun, and the notification. Who may use which
//! slot is `keeper::ledger`'s matter.
#![allow(unsafe_code)]

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    ptr::NonNull,
    sync::Arc,
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
    unistd::ftruncate,
};

use super::seccomp::Notification;

/// One slot as it lies in memory.
#[repr(C)]
#[derive(Clone, Copy)]
struct Place {
    listener: u64,
    begun: u64,
    notification: libc::seccomp_notif,
}

const STRIDE: usize = 128;
const _: () = assert!(size_of::<Place>() <= STRIDE);

/// What stands in a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    pub listener: u64,
    pub begun: bool,
    pub notification: Notification,
}

/// Makes memory for so many slots. Its size is sealed: whoever maps it cannot be hurt by another's shrinking it.
pub fn create(count: usize) -> io::Result<OwnedFd> {
    let file = memfd_create("marline-ledger", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    ftruncate(&file, i64::try_from(count * STRIDE).map_err(io::Error::other)?)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

/// All that is written in such memory.
pub fn written(file: impl AsFd) -> io::Result<Vec<Written>> {
    let file = std::fs::File::from(file.as_fd().try_clone_to_owned()?);
    let mut bytes = vec![0; usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, 0)?;
    let places = bytes.chunks_exact(STRIDE).map(|chunk| {
        // SAFETY: a chunk is larger than a Place, which is plain data for which every value is valid.
        unsafe { chunk.as_ptr().cast::<Place>().read_unaligned() }
    });
    Ok(places.filter_map(|place| Written::of(&place)).collect())
}

/// The memory, mapped.
#[derive(Debug)]
pub struct Slots {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping belongs to no thread; access to single slots is exclusive by `Slot`.
unsafe impl Send for Slots {}
// SAFETY: as above.
unsafe impl Sync for Slots {}

impl Slots {
    /// Maps memory that `create` made, here or elsewhere.
    pub fn map(file: impl AsFd) -> io::Result<Arc<Self>> {
        let file = file.as_fd();
        let seals = SealFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GET_SEALS)?);
        let length = usize::try_from(nix::sys::stat::fstat(file)?.st_size).map_err(io::Error::other)?;
        if !seals.contains(SealFlag::F_SEAL_SHRINK) || length < STRIDE {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the memory of a ledger"));
        }
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at zero"))?;
        Ok(Arc::new(Self { base, length }))
    }

    pub fn count(&self) -> usize {
        self.length / STRIDE
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no slot lives any more: each holds an Arc of this.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

/// The use of one slot. Given back empty.
#[derive(Debug)]
pub struct Slot {
    slots: Arc<Slots>,
    number: u32,
}

impl Slot {
    /// Takes a slot of which the caller knows that nobody else has it.
    pub(crate) fn take(slots: &Arc<Slots>, number: u32, listener: u64) -> Option<Self> {
        if number as usize >= slots.count() {
            return None;
        }
        let slot = Self { slots: slots.clone(), number };
        slot.clear();
        // SAFETY: the place lies within the mapping and is aligned, as the stride is.
        unsafe { (&raw mut (*slot.place()).listener).write_volatile(listener) };
        Some(slot)
    }

    pub fn number(&self) -> u32 {
        self.number
    }

    /// Notes that the call's socket is being worked on, before it is.
    pub fn begin(&self) {
        // SAFETY: as in `take`.
        unsafe { (&raw mut (*self.place()).begun).write_volatile(1) };
    }

    /// Takes the notification out again, so that the slot can receive another one.
    pub(super) fn clear(&self) {
        // SAFETY: as in `take`; all zeroes is a valid notification.
        unsafe {
            (&raw mut (*self.place()).notification).write_volatile(std::mem::zeroed());
            (&raw mut (*self.place()).begun).write_volatile(0);
        }
    }

    pub(super) fn notification(&self) -> *mut libc::seccomp_notif {
        // SAFETY: the place lies within the mapping.
        unsafe { &raw mut (*self.place()).notification }
    }

    pub(super) fn read(&self) -> Option<Notification> {
        // SAFETY: as in `take`.
        Written::of(&unsafe { self.place().read_volatile() }).map(|written| written.notification)
    }

    fn place(&self) -> *mut Place {
        // SAFETY: `take` has checked the number against the mapping's length.
        unsafe { self.slots.base.as_ptr().add(self.number as usize * STRIDE).cast() }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.clear();
        // SAFETY: as in `take`.
        unsafe { (&raw mut (*self.place()).listener).write_volatile(0) };
    }
}

impl Written {
    fn of(place: &Place) -> Option<Self> {
        // A slot that waits for a notification has none; the kernel counts them from a random number.
        (place.notification.id != 0).then(|| Self {
            listener: place.listener,
            begun: place.begun != 0,
            notification: Notification::of(&place.notification),
        })
    }
}
