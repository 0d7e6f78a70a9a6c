//! A kernel in a few tables, with the parts of zram, zswap and swap that setting a host up meets. It can be built without
//! a part, and told to refuse, to take half a command, or to die at the Nth call that changes something.
use crate::system::{FirstPage, System, short_write};
use plimsoll_sys::swap::{SwapError, SwapPriority, SwapRank};
use plimsoll_types::{ByteCount, PAGE_SIZE};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What goes wrong.
#[derive(Clone, Copy, Debug)]
pub(super) enum Trouble {
    /// The process dies; the call has not happened.
    DeathBefore,
    /// The process dies; the call has happened.
    DeathAfter,
    /// The kernel refuses.
    Refusal(Errno),
    /// A command is taken in part only, and does nothing.
    Short,
    /// Somebody removes the device of that number just then.
    Removal(u32),
}

/// What the process dies of.
struct Dead;

#[derive(Clone, Debug, PartialEq, Eq)]
struct FakeDisk {
    sequence: u64,
    attributes: BTreeMap<String, String>,
    page: FirstPage,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Area {
    size: u64,
    used: u64,
    priority: i32,
}

/// All that may change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Host {
    files: BTreeMap<PathBuf, String>,
    disks: BTreeMap<u32, FakeDisk>,
    areas: BTreeMap<PathBuf, Area>,
}

#[derive(Debug)]
struct Inner {
    host: Host,
    attributes: Vec<(&'static str, &'static str)>,
    next_sequence: u64,
    changes: usize,
    trouble: Option<(usize, Trouble)>,
}

#[derive(Debug)]
pub(super) struct Fake(Mutex<Inner>);

/// What every zram device has.
const SMALL: [(&str, &str); 6] = [
    ("comp_algorithm", "[lzo-rle] lzo lz4"),
    ("disksize", "0"),
    ("initstate", "0"),
    ("mem_limit", ""),
    ("idle", ""),
    ("mm_stat", "0 0 0 0 0 0 0 0 0"),
];
/// What it has where the kernel was built with everything.
const LARGE: [(&str, &str); 4] =
    [("recomp_algorithm", ""), ("recompress", ""), ("backing_dev", "none"), ("writeback", "")];

const FILES: [(&str, &str); 10] = [
    (
        "/proc/meminfo",
        "MemTotal:        8388608 kB\nMemAvailable:    4194304 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n",
    ),
    ("/proc/sys/kernel/random/boot_id", "boot-1\n"),
    ("/proc/sys/kernel/osrelease", "6.18.1-test\n"),
    ("/proc/self/mounts", "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"),
    (
        "/proc/crypto",
        "name         : lz4\ntype         : scomp\n\nname         : sha1\ntype         : shash\n\nname         : lzo\ntype         : compression\n",
    ),
    ("/sys/class/zram-control/hot_add", ""),
    ("/sys/class/zram-control/hot_remove", ""),
    ("/sys/module/zswap/parameters/enabled", "N\n"),
    ("/sys/module/zswap/parameters/compressor", "lzo\n"),
    ("/sys/module/zswap/parameters/max_pool_percent", "20\n"),
];

impl Fake {
    /// A kernel as small as the one this project is developed on, with one unused zram device.
    pub(super) fn small() -> Self {
        Self::with(SMALL.to_vec())
    }

    /// One with recompression and write-back.
    pub(super) fn large() -> Self {
        let mut attributes: Vec<_> = SMALL.iter().chain(&LARGE).copied().collect();
        attributes[0].1 = "[lzo-rle] lzo lz4 zstd";
        Self::with(attributes)
    }

    fn with(attributes: Vec<(&'static str, &'static str)>) -> Self {
        let files = FILES.map(|(path, text)| (PathBuf::from(path), text.to_owned())).into_iter().collect();
        let host = Host { files, disks: BTreeMap::new(), areas: BTreeMap::new() };
        let inner = Inner { host, attributes, next_sequence: 10, changes: 0, trouble: None };
        let fake = Self(Mutex::new(inner));
        fake.add_disk();
        fake
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that may change, to compare with.
    pub(super) fn host(&self) -> Host {
        self.inner().host.clone()
    }

    /// Has trouble at the `at`th change from now, counted from 0.
    pub(super) fn trouble(&self, at: usize, trouble: Trouble) {
        let mut inner = self.inner();
        inner.changes = 0;
        inner.trouble = Some((at, trouble));
    }

    /// No more of it. True if it has happened.
    pub(super) fn no_trouble(&self) -> bool {
        let mut inner = self.inner();
        let happened = inner.trouble.take().is_some_and(|(at, _)| inner.changes > at);
        inner.changes = 0;
        happened
    }

    pub(super) fn set_file(&self, path: &str, text: &str) {
        self.inner().host.files.insert(path.into(), text.to_owned());
    }

    pub(super) fn remove_file(&self, path: &str) {
        self.inner().host.files.remove(Path::new(path));
    }

    pub(super) fn attribute(&self, number: u32, name: &str) -> String {
        self.inner().host.disks[&number].attributes[name].clone()
    }

    pub(super) fn set_attribute(&self, number: u32, name: &str, value: &str) {
        let mut inner = self.inner();
        let disk = inner.host.disks.get_mut(&number).unwrap();
        disk.attributes.insert(name.to_owned(), value.to_owned());
    }

    pub(super) fn overwrite_page(&self, number: u32) {
        self.inner().host.disks.get_mut(&number).unwrap().page[0] = 1;
    }

    /// Somebody else adds a device.
    pub(super) fn add_disk(&self) -> u32 {
        self.inner().add_disk()
    }

    pub(super) fn remove_disk(&self, number: u32) {
        self.inner().host.disks.remove(&number);
    }

    /// Somebody else has swap.
    pub(super) fn add_area(&self, path: &str, priority: i32) {
        let size = ByteCount::mib(512).0;
        self.inner().host.areas.insert(path.into(), Area { size, used: 0, priority });
    }

    pub(super) fn remove_area(&self, path: &str) {
        self.inner().host.areas.remove(Path::new(path));
    }

    pub(super) fn fill_area(&self, path: &str, used: ByteCount) {
        self.inner().host.areas.get_mut(Path::new(path)).unwrap().used = used.0;
    }

    pub(super) fn set_priority(&self, path: &str, priority: i32) {
        self.inner().host.areas.get_mut(Path::new(path)).unwrap().priority = priority;
    }

    /// All that was set at run time is gone, and so are all devices but the first.
    pub(super) fn reboot(&self) {
        let fresh = Self::with(self.inner().attributes.clone()).host();
        self.inner().host = fresh;
        self.set_file("/proc/sys/kernel/random/boot_id", "boot-2\n");
    }
}

impl Inner {
    fn add_disk(&mut self) -> u32 {
        let number = (0..).find(|number| !self.host.disks.contains_key(number)).unwrap();
        let mut attributes: BTreeMap<String, String> =
            self.attributes.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        attributes.insert("diskseq".to_owned(), self.next_sequence.to_string());
        attributes.insert("dev".to_owned(), format!("252:{number}"));
        let disk = FakeDisk { sequence: self.next_sequence, attributes, page: [0; PAGE_SIZE] };
        self.next_sequence += 1;
        self.host.disks.insert(number, disk);
        number
    }

    fn write(&mut self, path: &Path, text: &str) -> io::Result<()> {
        if path.ends_with("hot_remove") {
            let number = text.parse().unwrap();
            if self.host.areas.contains_key(&node(number)) {
                return Err(Errno::BUSY.into());
            }
            return self.host.disks.remove(&number).map(drop).ok_or(Errno::NODEV.into());
        }
        if let Some((number, name)) = attribute_of(path) {
            let disk = self.host.disks.get_mut(&number).ok_or(Errno::NOENT)?;
            let is_sized = disk.attributes["disksize"] != "0";
            let value = disk.attributes.get_mut(name).ok_or(Errno::NOENT)?;
            match name {
                "disksize" | "comp_algorithm" | "recomp_algorithm" | "backing_dev" if is_sized => {
                    return Err(Errno::BUSY.into());
                }
                "comp_algorithm" => {
                    let names: Vec<String> =
                        value.split(' ').map(|name| name.trim_matches(['[', ']']).to_owned()).collect();
                    if !names.iter().any(|name| name == text) {
                        return Err(Errno::INVAL.into());
                    }
                    let mark = |name: &String| if name == text { format!("[{name}]") } else { name.clone() };
                    *value = names.iter().map(mark).collect::<Vec<_>>().join(" ");
                }
                _ => text.clone_into(value),
            }
            if name == "recompress" {
                disk.shrink();
            }
            return Ok(());
        }
        let value = self.host.files.get_mut(path).ok_or(Errno::NOENT)?;
        *value = format!("{text}\n");
        Ok(())
    }
}

impl FakeDisk {
    /// Makes up to a MiB of what is compressed smaller, as if there were nothing else.
    fn shrink(&mut self) {
        let mut numbers: Vec<u64> =
            self.attributes["mm_stat"].split(' ').map(|number| number.parse().unwrap()).collect();
        numbers[1] = numbers[1].saturating_sub(ByteCount::mib(1).0);
        let text = numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(" ");
        self.attributes.insert("mm_stat".to_owned(), text);
    }
}

fn node(number: u32) -> PathBuf {
    format!("/dev/zram{number}").into()
}

fn number_of(node: &Path) -> Option<u32> {
    node.to_str()?.strip_prefix("/dev/zram")?.parse().ok()
}

fn attribute_of(path: &Path) -> Option<(u32, &str)> {
    let (disk, attribute) = path.to_str()?.strip_prefix("/sys/block/zram")?.split_once('/')?;
    Some((disk.parse().ok()?, attribute))
}

impl Fake {
    /// Does one change, with whatever trouble is due.
    fn change<T>(&self, change: impl FnOnce(&mut Inner) -> io::Result<T>) -> io::Result<T> {
        let mut inner = self.inner();
        let trouble = inner.trouble.filter(|(at, _)| *at == inner.changes).map(|(_, trouble)| trouble);
        inner.changes += 1;
        let die = |inner: MutexGuard<'_, Inner>| -> ! {
            drop(inner);
            resume_unwind(Box::new(Dead))
        };
        match trouble {
            None => change(&mut inner),
            Some(Trouble::DeathBefore) => die(inner),
            Some(Trouble::DeathAfter) => {
                let _ = change(&mut inner);
                die(inner)
            }
            Some(Trouble::Refusal(errno)) => Err(errno.into()),
            Some(Trouble::Short) => Err(short_write(1, 2)),
            Some(Trouble::Removal(number)) => {
                inner.host.areas.remove(&node(number));
                inner.host.disks.remove(&number);
                change(&mut inner)
            }
        }
    }
}

/// Runs what may die. `None` if it did.
pub(super) fn mortal<T>(life: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(life)) {
        Ok(result) => Some(result),
        Err(panic) if panic.is::<Dead>() => None,
        Err(panic) => resume_unwind(panic),
    }
}

fn swap_error(node: &Path, source: io::Error) -> SwapError {
    match Errno::from_io_error(&source) {
        Some(Errno::BUSY) => SwapError::Busy(node.into()),
        Some(Errno::INVAL) => SwapError::NotSwap(node.into()),
        _ => SwapError::Other { path: node.into(), source },
    }
}

impl System for Fake {
    fn read(&self, path: &Path) -> io::Result<String> {
        let inner = self.inner();
        if path == Path::new("/proc/swaps") {
            let line = |(path, area): (&PathBuf, &Area)| {
                let kind = if path.starts_with("/dev") { "partition" } else { "file" };
                format!(
                    "{} {kind} {} {} {}\n",
                    path.display(),
                    area.size >> 10,
                    area.used >> 10,
                    area.priority
                )
            };
            let lines: String = inner.host.areas.iter().map(line).collect();
            return Ok(format!("Filename Type Size Used Priority\n{lines}"));
        }
        let found = match attribute_of(path) {
            Some((number, name)) => inner
                .host
                .disks
                .get(&number)
                .and_then(|disk| disk.attributes.get(name))
                .map(|v| format!("{v}\n")),
            None => inner.host.files.get(path).cloned(),
        };
        found.ok_or(Errno::NOENT.into())
    }

    fn read_once(&self, path: &Path) -> io::Result<String> {
        assert!(path.ends_with("hot_add"));
        self.change(|inner| Ok(format!("{}\n", inner.add_disk())))
    }

    fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        self.change(|inner| inner.write(path, text))
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<String>> {
        let inner = self.inner();
        if directory == Path::new("/sys/block") {
            return Ok(inner.host.disks.keys().map(|number| format!("zram{number}")).collect());
        }
        let below = inner.host.files.keys().filter_map(|path| path.strip_prefix(directory).ok());
        let mut names: Vec<String> =
            below.filter_map(|path| Some(path.iter().next()?.to_str()?.to_owned())).collect();
        names.dedup();
        if names.is_empty() { Err(Errno::NOENT.into()) } else { Ok(names) }
    }

    fn exists(&self, path: &Path) -> bool {
        self.read(path).is_ok() || self.inner().host.files.keys().any(|file| file.starts_with(path))
    }

    fn first_page(&self, node: &Path, _device: u64) -> io::Result<FirstPage> {
        let inner = self.inner();
        let disk = number_of(node).and_then(|number| inner.host.disks.get(&number));
        disk.map(|disk| disk.page).ok_or(Errno::NOENT.into())
    }

    fn write_first_page(&self, node: &Path, device: u64, page: &FirstPage) -> io::Result<()> {
        self.change(|inner| {
            let number = number_of(node).ok_or(Errno::NOENT)?;
            assert_eq!(device, rustix::fs::makedev(252, number), "the wrong disk");
            inner.host.disks.get_mut(&number).ok_or(Errno::NOENT)?.page = *page;
            Ok(())
        })
    }

    fn swapon(&self, node: &Path, priority: SwapPriority) -> Result<(), SwapError> {
        let ranks = (0..=i16::MAX).filter_map(|rank| Some((i32::from(rank), SwapRank::new(rank)?)));
        let priority = match priority {
            SwapPriority::Lowest => -2,
            SwapPriority::Fixed(rank) => ranks.into_iter().find(|(_, other)| *other == rank).unwrap().0,
        };
        let switched = self.change(|inner| {
            let disk =
                number_of(node).and_then(|number| inner.host.disks.get(&number)).ok_or(Errno::NOENT)?;
            let is_formatted = disk.page.ends_with(b"SWAPSPACE2");
            let size = disk.attributes["disksize"].parse::<u64>().unwrap();
            if !is_formatted || size == 0 {
                return Err(Errno::INVAL.into());
            }
            let area = Area { size: size - PAGE_SIZE as u64, used: 0, priority };
            match inner.host.areas.insert(node.into(), area) {
                None => Ok(()),
                Some(_) => Err(Errno::BUSY.into()),
            }
        });
        switched.map_err(|source| swap_error(node, source))
    }

    fn swapoff(&self, node: &Path) -> Result<(), SwapError> {
        let switched =
            self.change(|inner| inner.host.areas.remove(node).map(drop).ok_or(Errno::INVAL.into()));
        switched.map_err(|source| swap_error(node, source))
    }
}
