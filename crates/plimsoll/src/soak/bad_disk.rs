//! A disk that fails, for the daemon of a chaos run: small, filled and emptied by somebody else, and refusing writes at times.
//!
//! Enters: a seed. Leaves: a path to be given to the daemon, and trouble with it at random instants until it is told to end. What must
//! never happen: a mount, a loop device or a file that is left behind. So nothing of it has a name: the image is removed once it is
//! a loop device, the file system is detached from its place once it is mounted, and devices are given up while they are in use, which
//! the kernel takes as "when nobody uses them any more". However this process ends, all of it goes with its descriptors.
//!
//! | seed | the tier is | what is done to it |
//! |---|---|---|
//! | even | a file, beside ballast that takes the file system's room | `fallocate` finds none |
//! | odd | a device with room promised and not there, as of a thin pool, and read-only at times | writes end with `ENOSPC`, or with `EPERM` |
//!
//! Reads are left alone: a page that cannot be read is lost, and rightly so.
use plimsoll_guest::random::{Rng, hash3};
use plimsoll_linux::explain;
use plimsoll_types::ByteCount;
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, fstatvfs, ftruncate, openat};
use rustix::mount::{UnmountFlags, unmount};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// What a file system has beside the tier: its own tables.
const TABLES: ByteCount = ByteCount::mib(32);
/// The longest time between two changes.
const CALM_MS: u64 = 120;
/// At most so much is left by the ballast: not one segment, or a few.
const LEFT: ByteCount = ByteCount::mib(4);

/// See the file's head.
pub(super) struct BadDisk {
    path: PathBuf,
    is_over: Arc<AtomicBool>,
    trouble: Option<JoinHandle<u64>>,
    /// What holds the device and the file system.
    _device: Option<std::fs::File>,
}

/// What is done to the disk.
struct Trouble {
    rng: Rng,
    root: OwnedFd,
    ballast: OwnedFd,
    /// The tier's own device.
    device: Option<PathBuf>,
    is_over: Arc<AtomicBool>,
}

impl BadDisk {
    /// Makes one on which a tier of that size would fit. `place` is an empty directory.
    pub(super) fn create(place: &Path, seed: u64, size: ByteCount) -> Result<Self, String> {
        let image = place.join("image");
        let made = std::fs::File::create(&image).and_then(|file| file.set_len(size.0 + TABLES.0));
        made.map_err(|error| failed(&error))?;
        run("mkfs.ext4", &["-q", "-F", "-O", "^has_journal", "-m", "0", "-E", "nodiscard"], &image)?;
        let device = loop_over(&image)?;
        std::fs::remove_file(&image).map_err(|error| failed(&error))?;
        let root = place.join("root");
        std::fs::create_dir(&root).map_err(|error| failed(&error))?;
        let mounted = run("mount", &["-t", "ext4", &device], &root);
        // Mounted or not: it goes with its last user.
        let given_up = run("losetup", &["-d"], Path::new(&device));
        mounted?;
        let disk = Self::on(&root, seed, size);
        let detached = unmount(&root, UnmountFlags::DETACH).map_err(|errno| failed(&errno));
        let _ = std::fs::remove_dir(&root);
        given_up.and(detached).and(disk)
    }

    /// In a file system that is mounted there, for as long as this is going on.
    fn on(root: &Path, seed: u64, size: ByteCount) -> Result<Self, String> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(root, flags, Mode::empty()).map_err(|errno| failed(&errno))?;
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC;
        let ballast = openat(&opened, "ballast", flags, Mode::RUSR | Mode::WUSR);
        let ballast = ballast.map_err(|errno| failed(&errno))?;
        let (mut held, mut device) = (None, None);
        if !seed.is_multiple_of(2) {
            let backing = root.join("backing");
            let made = std::fs::File::create(&backing).and_then(|file| file.set_len(size.0));
            made.map_err(|error| failed(&error))?;
            let path = loop_over(&backing)?;
            held = Some(std::fs::File::open(&path).map_err(|error| failed(&error))?);
            run("losetup", &["-d"], Path::new(&path))?;
            device = Some(PathBuf::from(path));
        }
        let file = || format!("/proc/{}/fd/{}/tier", std::process::id(), opened.as_raw_fd()).into();
        let path = device.clone().unwrap_or_else(file);
        let is_over = Arc::new(AtomicBool::new(false));
        let rng = Rng::new(hash3(seed, 11, 0));
        let trouble = Trouble { rng, root: opened, ballast, device, is_over: Arc::clone(&is_over) };
        let trouble = std::thread::Builder::new().name("trouble".to_owned()).spawn(move || trouble.make());
        let trouble = Some(trouble.map_err(|error| failed(&error))?);
        Ok(Self { path, is_over, trouble, _device: held })
    }

    /// What the daemon is to have for its tier.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Lets trouble begin, now that the tier has what it needs to begin with.
    pub(super) fn begin(&self) {
        if let Some(trouble) = &self.trouble {
            trouble.thread().unpark();
        }
    }

    /// Ends it; how many changes there were. From here on the disk is as good as any.
    pub(super) fn end(&mut self) -> u64 {
        self.is_over.store(true, Ordering::Relaxed);
        let Some(trouble) = self.trouble.take() else { return 0 };
        trouble.thread().unpark();
        trouble.join().unwrap_or(0)
    }
}

impl Drop for BadDisk {
    fn drop(&mut self) {
        self.end();
    }
}

impl Trouble {
    /// Until it is over. The file system is held until then, and by whoever has a file in it.
    fn make(mut self) -> u64 {
        std::thread::park();
        let mut changes = 0;
        while !self.is_over.load(Ordering::Relaxed) {
            let calm = self.rng.below(CALM_MS);
            std::thread::park_timeout(Duration::from_millis(calm));
            changes += 1;
            let has_device = self.device.is_some();
            match self.rng.below(if has_device { 8 } else { 5 }) {
                0..3 => self.fill(),
                3 | 4 => self.empty(),
                5 | 6 => self.refuse("--setro"),
                _ => self.refuse("--setrw"),
            }
        }
        self.empty();
        self.refuse("--setrw");
        changes
    }

    /// Best effort, as all of it: what does not come about now does at another time.
    fn fill(&mut self) {
        let Ok(room) = fstatvfs(&self.root) else { return };
        let left = self.rng.below(LEFT.0);
        let taken = (room.f_bavail * room.f_frsize).saturating_sub(left);
        let _ = fallocate(&self.ballast, FallocateFlags::KEEP_SIZE, 0, taken.max(1));
    }

    fn empty(&self) {
        let _ = ftruncate(&self.ballast, 1).and_then(|()| ftruncate(&self.ballast, 0));
    }

    fn refuse(&self, how: &str) {
        if let Some(device) = &self.device {
            let _ = run("blockdev", &[how], device);
        }
    }
}

fn failed(error: &dyn std::error::Error) -> String {
    format!("no disk to fail: {}", explain(error))
}

/// A loop device over a file, past the page cache, which would count as memory of whoever writes.
fn loop_over(file: &Path) -> Result<String, String> {
    let path = run("losetup", &["--find", "--show", "--direct-io=on"], file)?;
    Ok(path.trim().to_owned())
}

/// What a program prints that is given options and a path.
fn run(program: &str, options: &[&str], path: &Path) -> Result<String, String> {
    let ran = Command::new(program).args(options).arg(path).output();
    let ran = ran.map_err(|error| format!("no disk to fail: {program}: {error}"))?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if ran.status.success() {
        return Ok(said(&ran.stdout));
    }
    Err(format!(
        "no disk to fail: {program} {} {}: {}",
        options.join(" "),
        path.display(),
        said(&ran.stderr).trim()
    ))
}
