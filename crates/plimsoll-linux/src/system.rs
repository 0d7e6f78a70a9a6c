//! The kernel's files and swap calls as one boundary, so that what sets a host up can be tested on a kernel that has
//! more, has less, refuses, or dies between two steps.
//!
//! Paths and texts enter; what the kernel answers leaves. What must never happen here: a second attempt (a write to
//! sysfs is a command), or a write to a block device other than the one that was meant.
use plimsoll_sys::swap::{self, SwapError, SwapPriority};
use plimsoll_types::PAGE_SIZE;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

/// The first page of a disk, where a swap area has its header.
pub type FirstPage = [u8; PAGE_SIZE];

/// What the kernel lets a host's owner see and set.
pub trait System: Sync {
    /// The text of a file.
    fn read(&self, path: &Path) -> io::Result<String>;
    /// The text of a file of which each read is a command: one system call, at most 256 bytes.
    fn read_once(&self, path: &Path) -> io::Result<String>;
    /// Writes a text into an existing file by one system call, whole or not at all.
    fn write(&self, path: &Path, text: &str) -> io::Result<()>;
    /// The names in a directory, in order.
    fn list(&self, directory: &Path) -> io::Result<Vec<String>>;
    /// Whether there is such a file.
    fn exists(&self, path: &Path) -> bool;
    /// Reads the first page of the block device at `node`, provided that it is the one of that number.
    fn first_page(&self, node: &Path, device: u64) -> io::Result<FirstPage>;
    /// Writes the first page of the block device at `node`, provided that it is the one of that number.
    fn write_first_page(&self, node: &Path, device: u64, page: &FirstPage) -> io::Result<()>;
    /// Puts a swap area to use.
    fn swapon(&self, node: &Path, priority: SwapPriority) -> Result<(), SwapError>;
    /// Ends its use, reading back all that is in it.
    fn swapoff(&self, node: &Path) -> Result<(), SwapError>;
}

/// The kernel this process runs on.
#[derive(Clone, Copy, Debug)]
pub struct Linux;

impl System for Linux {
    fn read(&self, path: &Path) -> io::Result<String> {
        // Some files name processes and devices, which may hold any bytes.
        fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    fn read_once(&self, path: &Path) -> io::Result<String> {
        let mut buffer = [0; 256];
        let length = File::open(path)?.read(&mut buffer)?;
        Ok(String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned())
    }

    fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        let taken = OpenOptions::new().write(true).open(path)?.write(text.as_bytes())?;
        if taken == text.len() { Ok(()) } else { Err(short_write(taken, text.len())) }
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<String>> {
        let entries: io::Result<Vec<_>> = fs::read_dir(directory)?.collect();
        let mut names: Vec<String> =
            entries?.into_iter().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort_unstable();
        Ok(names)
    }

    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }

    fn first_page(&self, node: &Path, device: u64) -> io::Result<FirstPage> {
        let mut page = [0; PAGE_SIZE];
        let disk = open_disk(OpenOptions::new().read(true), node, device)?;
        disk.read_exact_at(&mut page, 0)?;
        Ok(page)
    }

    fn write_first_page(&self, node: &Path, device: u64, page: &FirstPage) -> io::Result<()> {
        let disk = open_disk(OpenOptions::new().write(true), node, device)?;
        disk.write_all_at(page, 0)?;
        disk.sync_all()
    }

    fn swapon(&self, node: &Path, priority: SwapPriority) -> Result<(), SwapError> {
        swap::swapon(node, priority)
    }

    fn swapoff(&self, node: &Path) -> Result<(), SwapError> {
        swap::swapoff(node)
    }
}

/// What was opened is looked at, not what stands at the path: writing to the wrong disk cannot be undone.
fn open_disk(options: &OpenOptions, node: &Path, device: u64) -> io::Result<File> {
    let disk = options.open(node)?;
    let found = disk.metadata()?;
    if found.file_type().is_block_device() && found.rdev() == device {
        return Ok(disk);
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "another file stands at its path: is /dev a devtmpfs?"))
}

/// The error of a command that the kernel read only in part.
pub(crate) fn short_write(taken: usize, length: usize) -> io::Error {
    io::Error::new(io::ErrorKind::WriteZero, format!("only {taken} of {length} bytes were taken"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_the_disk_is_neither_read_nor_written() {
        let path = std::env::temp_dir().join(format!("plimsoll-no-disk-{}", std::process::id()));
        fs::write(&path, [7; 2 * PAGE_SIZE]).unwrap();
        let device = fs::metadata(&path).unwrap().rdev();
        let read = Linux.first_page(&path, device).unwrap_err();
        let written = Linux.write_first_page(&path, device, &[0; PAGE_SIZE]).unwrap_err();
        let content = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!((read.kind(), written.kind()), (io::ErrorKind::InvalidInput, io::ErrorKind::InvalidInput));
        assert_eq!(content, [7; 2 * PAGE_SIZE]);
    }

    #[test]
    fn writing_makes_no_file() {
        let path = std::env::temp_dir().join(format!("plimsoll-no-file-{}", std::process::id()));
        assert_eq!(Linux.write(&path, "1").unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(!Linux.exists(&path));
    }
}
