//! A disk each of whose blocks contains what its number says.
//!
//! Enters: a size and a seed. Leaves: a file that a guest takes as its disk and verifies, and that is gone when the last
//! guest is. Blocks the guest writes get contents of their next version, which the guest alone keeps count of.
use crate::protocol::content;
use plimsoll_guest::content::{Mix, MixError};
use plimsoll_types::{ByteCount, PAGE_SIZE};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use tempfile::TempPath;
use zerocopy::IntoBytes;

/// A disk could not be made or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// A disk without a whole block.
    #[error("a disk of {0} has no block: make it a multiple of 4K")]
    Empty(ByteCount),
    /// Its contents cannot be.
    #[error("no contents for the disk")]
    Content(#[from] MixError),
    /// There is no such block.
    #[error("block {block} was asked for and there are {blocks}")]
    NoBlock {
        /// Which.
        block: u64,
        /// How many there are.
        blocks: u64,
    },
    /// Its file cannot be written.
    #[error("cannot write the disk's file")]
    Write(#[from] io::Error),
}

/// A disk's file, removed when this is dropped.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: TempPath,
    seed: u64,
    blocks: u64,
}

impl Disk {
    /// Makes a disk in the folder for temporary files. `seed` decides on its contents.
    ///
    /// # Errors
    /// When the file cannot be written, or would be empty.
    pub fn create(size: ByteCount, seed: u64) -> Result<Self, DiskError> {
        let blocks = size.pages_floor().0;
        if blocks == 0 {
            return Err(DiskError::Empty(size));
        }
        let content = content(seed, Mix::default())?;
        let (file, path) = tempfile::Builder::new().prefix("plimsoll-disk-").tempfile()?.into_parts();
        let mut writer = BufWriter::with_capacity(1 << 20, &file);
        let mut words = [0; PAGE_SIZE / 8];
        for block in 0..blocks {
            content.fill(block, 1, &mut words);
            writer.write_all(words.as_bytes())?;
        }
        writer.flush()?;
        drop(writer);
        // Guests read past this host's cache.
        file.sync_all()?;
        Ok(Self { file, path, seed, blocks })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What decides on its contents.
    pub const fn seed(&self) -> u64 {
        self.seed
    }

    /// How many blocks of 4 KiB it has.
    pub const fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Inverts the lowest bit of a block, which its reader must notice.
    ///
    /// # Errors
    /// When there is no such block, or it cannot be written.
    pub fn corrupt(&self, block: u64) -> Result<(), DiskError> {
        if block >= self.blocks {
            return Err(DiskError::NoBlock { block, blocks: self.blocks });
        }
        let mut byte = [0];
        let offset = block * PAGE_SIZE as u64;
        self.file.read_exact_at(&mut byte, offset)?;
        self.file.write_all_at(&[byte[0] ^ 1], offset)?;
        Ok(self.file.sync_all()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_disk_holds_what_its_seed_says_and_corruption_is_one_bit() {
        let disk = Disk::create(ByteCount(3 * 4096 + 5), 7).unwrap();
        let content = content(7, Mix::default()).unwrap();
        let mut words = [0; 512];
        content.fill(2, 1, &mut words);
        let before = fs::read(disk.path()).unwrap();
        assert_eq!(before.len(), 3 * 4096);
        assert_eq!(&before[2 * 4096..], words.as_bytes());
        disk.corrupt(2).unwrap();
        let after = fs::read(disk.path()).unwrap();
        let changed: Vec<usize> = (0..after.len()).filter(|&at| after[at] != before[at]).collect();
        assert_eq!(changed, [2 * 4096]);
        let path = disk.path().to_owned();
        assert!(matches!(disk.corrupt(3), Err(DiskError::NoBlock { block: 3, blocks: 3 })));
        drop(disk);
        assert!(!path.exists());
    }

    #[test]
    fn a_disk_without_a_block_is_refused() {
        assert_eq!(
            Disk::create(ByteCount(4095), 1).unwrap_err().to_string(),
            "a disk of 3.9K has no block: make it a multiple of 4K"
        );
    }
}
