//! Where it was measured: kernel, processor, and what the kernel encrypts with.

use std::{
    fs,
    process::{Command, Stdio},
};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::{demo::kernel::Kernel, step::Step};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Place {
    pub kernel: String,
    /// Whether it has kernel TLS, and why not.
    pub ktls: String,
    /// The kernel's implementation of AES-GCM, if it has one loaded.
    pub cipher: Option<String>,
    pub processor: String,
    pub processors: usize,
    /// Whether time is instructions here.
    pub counted: bool,
    /// What counted them.
    pub qemu: Option<String>,
}

/// The QEMU that counts, as it calls itself.
pub(super) fn qemu() -> Result<String> {
    let step = Step::quiet("asking QEMU for its version");
    let text = step.output(Command::new("qemu-system-x86_64").arg("--version"))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

impl Place {
    /// Ask when the measuring is over: the kernel chooses a cipher when somebody wants one.
    pub(super) fn here(kernel: &Kernel, counted: bool) -> Self {
        let ciphers = fs::read_to_string("/proc/crypto").unwrap_or_default();
        Self {
            kernel: kernel.release.clone(),
            ktls: kernel.describe(),
            cipher: cipher(&ciphers).filter(|_| kernel.has_ktls()),
            processor: processor(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
            processors: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            counted,
            qemu: None,
        }
    }
}

/// Loads what udev would load on a whole system when it sees a processor that encrypts. The VM has no udev, and with the kernel's generic
/// cipher a proxied byte costs 90 instructions there.
pub(super) fn load_cipher() {
    // A processor without it has no such module to load; the output tells what was used.
    let _ = Command::new("modprobe").arg("aesni_intel").stdout(Stdio::null()).stderr(Stdio::null()).status();
}

fn processor(text: &str) -> String {
    let line = text.lines().find(|line| line.starts_with("model name"));
    let name = line.and_then(|line| line.split_once(':')).map(|(_, name)| name.trim());
    name.unwrap_or("unknown processor").to_owned()
}

/// The driver that the kernel prefers. Those that are only parts of others have names of their own.
fn cipher(text: &str) -> Option<String> {
    let field = |block: &str, name: &str| {
        let line = block.lines().find(|line| line.split(':').next().is_some_and(|field| field.trim() == name));
        line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned())
    };
    let blocks = text.split("\n\n").filter(|block| field(block, "name").as_deref() == Some("gcm(aes)"));
    let drivers =
        blocks.filter_map(|block| Some((field(block, "priority")?.parse::<u32>().ok()?, field(block, "driver")?)));
    drivers.max().map(|(_, driver)| driver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cipher_is_the_one_that_the_kernel_prefers() {
        let block = |name: &str, driver: &str, priority: u32| {
            format!(
                "name         : {name}\ndriver       : {driver}\nmodule       : kernel\npriority     : {priority}\n\n"
            )
        };
        let text = block("gcm(aes)", "gcm_base(ctr(aes-generic),ghash-clmulni)", 250)
            + &block("gcm(aes)", "generic-gcm-aesni", 400)
            + &block("__gcm(aes)", "__generic-gcm-aesni", 500);
        assert_eq!(cipher(&text).as_deref(), Some("generic-gcm-aesni"));
        assert_eq!(cipher(""), None);
    }

    #[test]
    fn a_processor_has_a_name_or_is_unknown() {
        assert_eq!(processor("processor\t: 0\nmodel name\t: Some CPU\n"), "Some CPU");
        assert_eq!(processor(""), "unknown processor");
    }
}
