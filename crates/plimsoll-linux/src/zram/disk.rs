//! One zram device by its number: what the kernel lets its owner do with it.
//!
//! A number and settings enter; the device's state leaves. What must never happen here: a decision about whose a device
//! is. Callers know, by its `diskseq`, a number that no second device of one boot gets.
use super::{ZramError, ZramStat, is, malformed, mm_stat};
use crate::system::{FirstPage, System};
use plimsoll_sys::swap::SwapPriority;
use plimsoll_types::{ByteCount, PAGE_SIZE, PageCount};
use rustix::io::Errno;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(super) const CONTROL: &str = "/sys/class/zram-control";
const BLOCK: &str = "/sys/block";

/// How often, and how far apart, removal is tried: programs that look at new disks (udev) open a device for moments.
const REMOVAL_TRIES: u32 = 100;
const REMOVAL_PAUSE: Duration = Duration::from_millis(10);

/// The kernel refuses a swap area of one page, and one of a few is of no use.
pub(super) const DISK_SIZE_MIN: ByteCount = ByteCount::mib(1);

/// A zram device, there or not.
#[derive(Clone, Copy)]
pub struct Disk<'a> {
    system: &'a dyn System,
    number: u32,
}

impl std::fmt::Debug for Disk<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "zram{}", self.number)
    }
}

/// Which pages of a device are compressed once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompress {
    /// Those marked idle.
    Idle,
    /// Those that did not compress.
    Huge,
    /// Those that did not compress and are marked idle.
    HugeIdle,
}

impl Recompress {
    const fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Huge => "huge",
            Self::HugeIdle => "huge_idle",
        }
    }
}

/// Which pages of a device are marked idle. A page loses the mark when it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdleSince {
    /// All pages.
    Now,
    /// Pages not used for that long, in whole seconds. The kernel must track access times.
    Longer(Duration),
}

impl<'a> Disk<'a> {
    /// The device that has, or may have, this number.
    pub const fn new(system: &'a dyn System, number: u32) -> Self {
        Self { system, number }
    }

    /// Adds an empty device. Every read of `hot_add` adds one: it is read exactly once.
    ///
    /// # Errors
    /// When the kernel has no zram, or refuses.
    pub fn add(system: &'a dyn System) -> Result<Self, ZramError> {
        if !is_offered(system) {
            return Err(ZramError::NoModule);
        }
        let path = Path::new(CONTROL).join("hot_add");
        let text = system.read_once(&path).map_err(|source| ZramError::new("read", &path, source))?;
        let number = text.trim().parse().map_err(|_| malformed(path, "the number of a new device", &text))?;
        Ok(Self { system, number })
    }

    /// The devices there are.
    ///
    /// # Errors
    /// When /sys/block cannot be read.
    pub fn all(system: &'a dyn System) -> Result<Vec<Self>, ZramError> {
        let names = system.list(BLOCK.as_ref()).map_err(|source| ZramError::new("list", BLOCK, source))?;
        let number = |name: &String| name.strip_prefix("zram")?.parse().ok();
        Ok(names.iter().filter_map(number).map(|number| Self { system, number }).collect())
    }

    /// N of `/dev/zramN`.
    pub const fn number(&self) -> u32 {
        self.number
    }

    /// `/dev/zramN`.
    pub fn node(&self) -> PathBuf {
        node(self.number)
    }

    /// The device's file of that name in sysfs.
    pub fn attribute(&self, name: &str) -> PathBuf {
        sysfs(self.number, name)
    }

    /// Whether the device has the attribute: what a kernel was built without is not there.
    pub fn has(&self, attribute: &str) -> bool {
        self.system.exists(&self.attribute(attribute))
    }

    /// What an attribute says.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn get(&self, attribute: &str) -> Result<String, ZramError> {
        let path = self.attribute(attribute);
        let text = self.system.read(&path).map_err(|source| ZramError::new("read", path, source))?;
        Ok(text.trim().to_owned())
    }

    /// Sets an attribute.
    ///
    /// # Errors
    /// When the kernel refuses or has no such attribute.
    pub fn set(&self, attribute: &str, value: &str) -> Result<(), ZramError> {
        let path = self.attribute(attribute);
        self.system.write(&path, value).map_err(|source| ZramError::new("write to", path, source))
    }

    /// What tells the device from every other one of this boot; `None` when there is no device of the number.
    ///
    /// # Errors
    /// When the kernel's answer cannot be read.
    pub fn sequence(&self) -> Result<Option<u64>, ZramError> {
        match self.get("diskseq") {
            Ok(text) => {
                let sequence = text.parse();
                sequence
                    .map(Some)
                    .map_err(|_| malformed(self.attribute("diskseq"), "a disk sequence number", &text))
            }
            Err(ZramError::Other { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Its size before compression; 0 while it is empty.
    ///
    /// # Errors
    /// When the kernel's answer cannot be read.
    pub fn size(&self) -> Result<ByteCount, ZramError> {
        let text = self.get("disksize")?;
        text.parse().map(ByteCount).map_err(|_| malformed(self.attribute("disksize"), "a size", &text))
    }

    /// Major and minor number in one.
    pub(super) fn device_id(&self) -> Result<u64, ZramError> {
        let text = self.get("dev")?;
        let numbers = text
            .split_once(':')
            .and_then(|(major, minor)| Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?)));
        numbers.ok_or_else(|| malformed(self.attribute("dev"), "a device number", &text))
    }

    /// Chooses the first algorithm of `preferred` that the kernel has.
    pub(crate) fn choose_algorithm(&self, preferred: &[&str]) -> Result<String, ZramError> {
        let offered = self.get("comp_algorithm")?;
        let chosen = choose(preferred, &offered).ok_or_else(|| ZramError::NoAlgorithm {
            wanted: preferred.iter().map(|name| (*name).to_owned()).collect(),
            offered,
        })?;
        self.set("comp_algorithm", chosen)?;
        Ok(chosen.to_owned())
    }

    /// Writes the header of a swap area as large as the device.
    pub(crate) fn format(&self, header: &SwapHeader) -> Result<(), ZramError> {
        let node = self.node();
        let written = self.system.write_first_page(&node, self.device_id()?, &header.bytes);
        written.map_err(|source| ZramError::new("write the swap header to", node, source))
    }

    /// Its first page.
    pub(crate) fn first_page(&self) -> Result<FirstPage, ZramError> {
        let node = self.node();
        let read = self.system.first_page(&node, self.device_id()?);
        read.map_err(|source| ZramError::new("read the first page of", node, source))
    }

    pub(crate) fn swapon(&self, priority: SwapPriority) -> Result<(), ZramError> {
        Ok(self.system.swapon(&self.node(), priority)?)
    }

    pub(crate) fn swapoff(&self) -> Result<(), ZramError> {
        Ok(self.system.swapoff(&self.node())?)
    }

    /// Resets and removes the device, which must not be in use. One that is gone already is no error.
    pub(crate) fn remove(&self) -> Result<(), ZramError> {
        let path = Path::new(CONTROL).join("hot_remove");
        for _ in 0..REMOVAL_TRIES {
            match self.system.write(&path, &self.number.to_string()) {
                Err(source) if is(&source, Errno::BUSY) => std::thread::sleep(REMOVAL_PAUSE),
                Err(source) if is(&source, Errno::NODEV) => return Ok(()),
                done => {
                    return done.map_err(|source| ZramError::new("remove a device through", path, source));
                }
            }
        }
        Err(ZramError::Busy { number: self.number })
    }

    /// Marks pages idle, for [`Self::recompress`] and for writing back.
    ///
    /// # Errors
    /// When the kernel was built without it. An age is refused by one that does not track access times
    /// (CONFIG_ZRAM_TRACK_ENTRY_ACTIME).
    pub fn mark_idle(&self, since: IdleSince) -> Result<(), ZramError> {
        let what = match since {
            IdleSince::Now => "all".to_owned(),
            IdleSince::Longer(age) => age.as_secs().to_string(),
        };
        self.set_offered("idle", &what)
    }

    /// Compresses pages once more with the device's second algorithm, and keeps what became smaller: `at_most` so many, which kernels
    /// before 6.10 do not heed. Costs processor time in this call; nothing in the kernel does it by itself.
    ///
    /// # Errors
    /// When the kernel was built without it (CONFIG_ZRAM_MULTI_COMP), or the device has no second algorithm.
    pub fn recompress(&self, pages: Recompress, at_most: Option<PageCount>) -> Result<(), ZramError> {
        let limit = at_most.map(|pages| format!(" max_pages={}", pages.0)).unwrap_or_default();
        self.set_offered("recompress", &format!("type={}{limit}", pages.name()))
    }

    /// What it holds and costs.
    ///
    /// # Errors
    /// When the kernel's answer cannot be read.
    pub fn stat(&self) -> Result<ZramStat, ZramError> {
        mm_stat(&self.get("mm_stat")?, || self.attribute("mm_stat"))
    }

    /// Sets an attribute that not every kernel has.
    pub(crate) fn set_offered(&self, attribute: &'static str, what: &str) -> Result<(), ZramError> {
        if !self.has(attribute) {
            return Err(ZramError::NotOffered { attribute });
        }
        self.set(attribute, what)
    }
}

/// Whether the kernel has zram.
pub fn is_offered(system: &dyn System) -> bool {
    system.exists(CONTROL.as_ref())
}

pub(super) fn sysfs(number: u32, file: &str) -> PathBuf {
    format!("{BLOCK}/zram{number}/{file}").into()
}

pub(super) fn node(number: u32) -> PathBuf {
    format!("/dev/zram{number}").into()
}

/// The names in a list where the one in use stands in brackets.
pub(crate) fn offered_names(offered: &str) -> impl Iterator<Item = &str> {
    offered.split_whitespace().map(|name| name.trim_matches(['[', ']']))
}

/// The first of `preferred` in the kernel's list.
pub(crate) fn choose<'a>(preferred: &[&'a str], offered: &str) -> Option<&'a str> {
    let mut preferred = preferred.iter().copied();
    preferred.find(|wanted| offered_names(offered).any(|name| name == *wanted))
}

/// The first page of a swap area of version 1, numbers in the machine's byte order:
///
/// ```text
/// 0     1024      1028        1032       1036       1052        1068                 4086      4096
/// +-----+---------+-----------+----------+----------+-----------+--------------------+---------+
/// | 0   | version | last page | bad      | UUID     | label     | 0 (the list of bad | "SWAP-  |
/// |     | u32 = 1 | u32       | pages    | 16 bytes | 16 bytes, | pages would start  | SPACE2" |
/// |     |         | pages - 1 | u32 = 0  | = 0      | 0 at end  | at 1536)           | 10 bytes|
/// +-----+---------+-----------+----------+----------+-----------+--------------------+---------+
/// ```
///
/// (`union swap_header` of linux/swap.h.) Page 0, this one, is counted but never swapped to.
pub(crate) struct SwapHeader {
    pub(crate) disk_size: ByteCount,
    pub(crate) bytes: FirstPage,
}

pub(crate) fn swap_header(disk_size: ByteCount) -> Result<SwapHeader, ZramError> {
    const MAGIC: &[u8; 10] = b"SWAPSPACE2";
    let bad_size = || ZramError::BadSize(disk_size);
    if disk_size < DISK_SIZE_MIN {
        return Err(bad_size());
    }
    let pages = disk_size.pages_ceil();
    let last_page = u32::try_from(pages.0 - 1).map_err(|_| bad_size())?;
    let mut bytes = [0; PAGE_SIZE];
    let fields: [(usize, &[u8]); 4] = [
        (1024, &1_u32.to_ne_bytes()),
        (1028, &last_page.to_ne_bytes()),
        (1052, b"plimsoll"),
        (PAGE_SIZE - MAGIC.len(), MAGIC),
    ];
    for (offset, field) in fields {
        bytes[offset..offset + field.len()].copy_from_slice(field);
    }
    Ok(SwapHeader { disk_size: pages.bytes(), bytes })
}
