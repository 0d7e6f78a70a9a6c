//! What a guest boots into: an archive with one program, the modules it loads, and two device files.
//!
//! Enters: a kernel. Leaves: the bytes of an archive in cpio's `newc` format, uncompressed. The kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst` describes it; each entry is
//!
//! ```text
//!   0  "070701"
//!   6  13 numbers of 8 hexadecimal digits: inode, mode, links, uid, gid, mtime, size,
//!      major and minor of the device it lies on, major and minor of the device it is, length of the name with its zero, 0
//! 110  name, a zero byte, zeros up to a multiple of 4
//!   .  contents, zeros up to a multiple of 4
//! ```
//!
//! and the last one is named `TRAILER!!!`. What must never happen: a name that occurs twice, for the second wins silently.
use crate::kernel::{Kernel, KernelError};

/// See `init/`; built by `build.rs`.
const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/init"));
/// The drivers of everything a guest may be given.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "virtio_balloon", "virtio_mem"];

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// The archive.
#[derive(Debug)]
pub struct Initramfs {
    bytes: Vec<u8>,
}

impl Initramfs {
    /// The archive for guests of a kernel.
    ///
    /// # Errors
    /// When the kernel lacks a module.
    pub fn build(kernel: &Kernel) -> Result<Self, KernelError> {
        let mut archive = Archive::default();
        for folder in ["dev", "proc", "sys", "modules"] {
            archive.add(folder, FOLDER, (0, 0), &[]);
        }
        // Before devtmpfs is mounted: the kernel opens the first for us, Rust's start-up code the second if it has to.
        archive.add("dev/console", CHARACTER_DEVICE, (5, 1), &[]);
        archive.add("dev/null", CHARACTER_DEVICE, (1, 3), &[]);
        archive.add("init", PROGRAM, (0, 0), INIT);
        for (place, module) in kernel.modules(&MODULES)?.iter().enumerate() {
            archive.add(&format!("modules/{place:02}-{}.ko", module.name), FILE, (0, 0), &module.bytes);
        }
        Ok(Self { bytes: archive.finish() })
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        self.entries += 1;
        let size = contents.len();
        let numbers = [self.entries, mode, 1, 0, 0, 0];
        self.bytes.extend_from_slice(b"070701");
        let mut number = |number: usize| self.bytes.extend_from_slice(format!("{number:08x}").as_bytes());
        numbers.into_iter().for_each(|one| number(one as usize));
        [size, 0, 0, device.0 as usize, device.1 as usize, name.len() + 1, 0].into_iter().for_each(number);
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_laid_out_as_the_format_says() {
        let mut archive = Archive::default();
        archive.add("dev/null", CHARACTER_DEVICE, (1, 3), &[]);
        archive.add("ab", FILE, (0, 0), b"hello");
        let bytes = archive.finish();
        let text = String::from_utf8(bytes.clone()).unwrap();
        let entry = |ino: u32, mode: u32, links_to: &str| format!("070701{ino:08x}{mode:08x}{links_to}");
        let zeros = "0".repeat(8);
        let first = entry(1, CHARACTER_DEVICE, &format!("00000001{}", zeros.repeat(6)));
        assert!(
            text.starts_with(&format!("{first}00000001000000030000000900000000dev/null\0\0")),
            "{text:?}"
        );
        let second = entry(2, FILE, &format!("00000001{}00000005{}", zeros.repeat(3), zeros.repeat(4)));
        let place = text.find(&second).unwrap();
        assert_eq!(place % 4, 0);
        assert!(text[place + second.len()..].starts_with("0000000300000000ab\0\0\0\0hello\0\0\0"));
        assert!(text.contains("0000000b00000000TRAILER!!!\0"));
        assert_eq!(bytes.len() % 4, 0);
    }
}
