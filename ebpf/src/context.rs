//! Reading and writing the kernel's context structures, one field at a time.
//!
//! The verifier wants each access in the field's own width and at a constant distance from the context pointer. The compiler
//! promises neither: it joins neighbouring accesses and lets two branches share one. So the instruction is written down.

/// Reads a 32-bit field of a context structure: `read!(pointer as Type, field)` or `read!(pointer as Type, field[index])`.
macro_rules! read {
    ($pointer:ident as $type:ty, $field:ident $([$index:literal])?) => {{
        let value: u64;
        // SAFETY: the kernel passes a valid context, and the verifier rejects any access outside of it.
        unsafe {
            core::arch::asm!(
                "{value} = *(u32 *)({pointer} + {offset})",
                value = out(reg) value,
                pointer = in(reg) $pointer,
                offset = const core::mem::offset_of!($type, $field) $(+ 4 * $index)?,
                options(nostack, readonly),
            );
        }
        value as u32
    }};
}

/// Reads a 64-bit field of a context structure.
macro_rules! read64 {
    ($pointer:ident as $type:ty, $field:ident) => {{
        let value: u64;
        // SAFETY: as for `read!`.
        unsafe {
            core::arch::asm!(
                "{value} = *(u64 *)({pointer} + {offset})",
                value = out(reg) value,
                pointer = in(reg) $pointer,
                offset = const core::mem::offset_of!($type, $field),
                options(nostack, readonly),
            );
        }
        value
    }};
}

/// Reads the pointer that a context structure holds in this field.
macro_rules! read_pointer {
    ($pointer:ident as $type:ty, $field:ident) => {
        crate::context::read64!($pointer as $type, $field) as *mut aya_ebpf::bindings::bpf_sock
    };
}

/// Reads an IPv6 address out of a context structure.
macro_rules! read_address6 {
    ($pointer:ident as $type:ty, $field:ident) => {
        marline_common::Address {
            words: [
                crate::context::read!($pointer as $type, $field[0]),
                crate::context::read!($pointer as $type, $field[1]),
                crate::context::read!($pointer as $type, $field[2]),
                crate::context::read!($pointer as $type, $field[3]),
            ],
        }
    };
}

/// Writes a 32-bit field of a context structure.
macro_rules! write {
    ($pointer:ident as $type:ty, $field:ident $([$index:literal])?, $value:expr) => {{
        let value: u32 = $value;
        // SAFETY: as for `read!`; fields that must not be written are rejected by the verifier.
        unsafe {
            core::arch::asm!(
                "*(u32 *)({pointer} + {offset}) = {value}",
                value = in(reg) u64::from(value),
                pointer = in(reg) $pointer,
                offset = const core::mem::offset_of!($type, $field) $(+ 4 * $index)?,
                options(nostack),
            );
        }
    }};
}

pub(crate) use {read, read_address6, read_pointer, read64, write};

pub(crate) const AF_INET: u32 = 2;
pub(crate) const SOCK_STREAM: u32 = 1;
pub(crate) const IPPROTO_TCP: u32 = 6;
pub(crate) const IPPROTO_UDP: u32 = 17;
pub(crate) const IPPROTO_MPTCP: u32 = 262;
/// The loopback device has this index in every network namespace.
pub(crate) const LOOPBACK_IFINDEX: u32 = 1;

pub(crate) const ECONNREFUSED: i32 = 111;
pub(crate) const EPROTONOSUPPORT: i32 = 93;
