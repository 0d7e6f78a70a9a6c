//! A process that looks like a VMM from outside. Its arguments are whatever the VMM's would be, and are not looked at.
//!
//! It says that it is ready, does what lines on standard input say, answers each with a line, and ends with its input:
//!
//! ```text
//! anonymous BYTES        maps private memory (marked as QEMU marks its own: not inherited by children)
//! memfd NAME BYTES       maps shared memory
//! file PATH BYTES        maps a file shared, which it makes
//! huge BYTES             maps huge pages of hugetlbfs shared
//! unmap                  unmaps what was mapped last
//! lock                   locks everything it has and will have
//! open PATH              opens a file of that path, which is nobody else's and not in the tree of files
//! guest-memfd BYTES      has KVM make memory that the host cannot map
//! child                  starts itself again, with the same arguments, until it ends; answers the number
//! exec PATH WORD…        becomes another program, which answers that it is ready
//! ```
//!
//! With `FLAP=N` in its environment it becomes, N times over, now `FLAP_VMM` and now `FLAP_OTHER`. The VMM has no memory
//! then, and the other program has 64 MiB: whoever finds RAM in a VMM has mixed them up.

use kvm_bindings::kvm_create_guest_memfd;
use kvm_ioctls::Kvm;
use plimsoll_sys::HvaRange;
use plimsoll_sys::mapping::{
    AnonymousMapping, ExclusiveMapping, HugePages, Memfd, SharedMapping, large_folio_folder,
};
use plimsoll_types::{ByteCount, Hva};
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, mkdirat, openat};
use rustix::mm::{MlockAllFlags, mlockall};
use std::any::Any;
use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader, Write, stdin, stdout};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

type Outcome = Result<String, Box<dyn Error>>;

enum Ram {
    Anonymous(AnonymousMapping),
    Memfd(SharedMapping),
    File(ExclusiveMapping),
}

impl Ram {
    fn range(&self) -> Option<HvaRange> {
        match self {
            Self::Anonymous(mapping) => Some(mapping.range()),
            Self::Memfd(mapping) => HvaRange::new(mapping.base(), mapping.size()),
            Self::File(mapping) => {
                let (base, size) = (mapping.as_ptr().addr(), mapping.len());
                HvaRange::new(Hva(u64::try_from(base).ok()?), ByteCount(u64::try_from(size).ok()?))
            }
        }
    }

    fn of_file(file: File, bytes: &str) -> Result<Self, Box<dyn Error>> {
        let size = ByteCount(bytes.parse()?);
        file.set_len(size.0)?;
        Ok(Self::File(ExclusiveMapping::inherit(file.into(), size, Duration::ZERO)?))
    }
}

/// What it has beside itself, until it ends.
#[derive(Default)]
struct Belongings {
    ram: Vec<Ram>,
    children: Vec<Child>,
    open: Vec<Box<dyn Any>>,
}

fn main() -> Result<(), Box<dyn Error>> {
    if let Some(left) = std::env::var("FLAP").ok().and_then(|left| left.parse::<u32>().ok()) {
        flap(left)?;
    }
    println!("ready");
    stdout().flush()?;
    let mut belongings = Belongings::default();
    for line in stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        match obey(&words, &mut belongings) {
            Ok(answer) => println!("{answer}"),
            Err(error) => println!("failed: {error}"),
        }
        stdout().flush()?;
    }
    Ok(())
}

fn obey(words: &[&str], Belongings { ram, children, open }: &mut Belongings) -> Outcome {
    match words {
        ["anonymous", bytes] => {
            ram.push(Ram::Anonymous(AnonymousMapping::new(ByteCount(bytes.parse()?), HugePages::Never)?));
        }
        ["memfd", name, bytes] => {
            let memfd = Memfd::create(name, ByteCount(bytes.parse()?))?;
            ram.push(Ram::Memfd(SharedMapping::new(&memfd)?));
        }
        ["file", path, bytes] => {
            let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
            ram.push(Ram::of_file(file, bytes)?);
        }
        ["huge", bytes] => {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
            ram.push(Ram::of_file(memfd_create("huge", flags)?.into(), bytes)?);
        }
        ["unmap"] => drop(ram.pop()),
        ["lock"] => mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE)?,
        ["open", path] => open.push(Box::new(open_alone(Path::new(path))?)),
        ["guest-memfd", bytes] => {
            let vm = Kvm::new()?.create_vm()?;
            let wanted = kvm_create_guest_memfd { size: bytes.parse()?, ..Default::default() };
            // The descriptor stays open as long as the process lives.
            vm.create_guest_memfd(wanted)?;
            open.push(Box::new(vm));
        }
        ["child"] => {
            // Its input is a pipe from here, which closes when this process ends.
            let mut command = Command::new(std::env::current_exe()?);
            command.args(std::env::args().skip(1)).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = command.spawn()?;
            let output = child.stdout.as_mut().ok_or("no output")?;
            BufReader::new(output).read_line(&mut String::new())?;
            let number = child.id().to_string();
            children.push(child);
            return Ok(number);
        }
        ["exec", path, words @ ..] => return Err(Command::new(path).args(words).exec().into()),
        _ => return Err("no such command".into()),
    }
    let range = ram.last().and_then(Ram::range);
    Ok(range.map_or("done".to_owned(), |range| format!("{:#x}-{:#x}", range.start().0, range.end().0)))
}

/// Opens an ordinary file below the root of a file system of its own: /proc shows that path, whatever the host has there.
fn open_alone(path: &Path) -> rustix::io::Result<OwnedFd> {
    let root = large_folio_folder()?;
    let relative = path.strip_prefix("/").unwrap_or(path);
    let mut folders: Vec<&Path> = relative.ancestors().skip(1).collect();
    // The last is the root itself.
    folders.pop();
    folders.into_iter().rev().try_for_each(|folder| mkdirat(&root, folder, Mode::RWXU))?;
    openat(&root, relative, OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)
}

fn flap(left: u32) -> Result<(), Box<dyn Error>> {
    let ram = match left % 2 {
        0 => None,
        _ => Some(AnonymousMapping::new(ByteCount::mib(64), HugePages::Never)?),
    };
    let Some(next) = left.checked_sub(1) else { return Ok(()) };
    let path = std::env::var(if next % 2 == 0 { "FLAP_VMM" } else { "FLAP_OTHER" })?;
    let error = Command::new(path).args(["-name", "flap", "-m", "64"]).env("FLAP", next.to_string()).exec();
    drop(ram);
    Err(error.into())
}
