//! How much a test moves. In the VM every instruction is emulated, 20 to 50 times slower; `MARLINE_LONG=1` is for whoever has the time.

use std::env;

use crate::cluster::Family;

/// Whether this runs in the VM, as `cargo xtask test` tells.
#[must_use]
pub fn in_vm() -> bool {
    env::var("MARLINE_TEST_ENV").is_ok_and(|place| place == "vm")
}

/// The amount for this machine, or for the VM.
pub fn amount<T>(native: T, vm: T) -> T {
    if in_vm() { vm } else { native }
}

/// The families that a flow goes over: both; in the VM one of them, by turns.
#[must_use]
pub fn families(turn: usize) -> Vec<Family> {
    amount(Family::BOTH.to_vec(), vec![Family::BOTH[turn % 2]])
}

/// The usual amount, or more where that is asked for.
pub fn or_long<T>(usual: T, more: T) -> T {
    if env::var("MARLINE_LONG").is_ok_and(|value| value == "1") { more } else { usual }
}
