//! The first and only process of a stock Linux guest: it fills memory, touches it, reads the disk, and verifies all of it.
//!
//! Enters: modules to load, in order, in the folder `/modules`; parameters on the kernel's command line; commands on the
//! second serial port. Leaves: answers on that port (see `protocol`). What must never happen: a read that is not
//! verified, or an answer given while the thread that touches memory stands still: there is one thread, and it does both.
//!
//! * [`memory`]: pages that know what they contain. [`disk`]: blocks that do, read past the guest's cache.
//! * [`work`]: what is done when. [`console`]: lines over the serial port. [`pace`]: so many operations a second.
mod console;
mod disk;
mod memory;
mod pace;
#[path = "../../src/protocol.rs"]
#[expect(dead_code, reason = "the host's half of the conversation")]
mod protocol;
mod work;

use console::Console;
use protocol::{Line, PARAMETER};
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, finit_module, reboot};
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use work::Work;

const MODULES: &str = "/modules";

fn main() {
    // Standard error is the kernel's console, and what init could say by its exit status is a kernel panic.
    if let Err(error) = run() {
        eprintln!("plimsoll-stock-init: {error}");
    }
    if let Err(error) = reboot(RebootCommand::PowerOff) {
        eprintln!("plimsoll-stock-init: cannot switch off: {error}");
    }
}

/// A sentence about what failed, for a person.
type Complaint = String;

fn run() -> Result<(), Complaint> {
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount(kind, place, kind, MountFlags::empty(), None)
            .map_err(|error| format!("cannot mount {kind}: {error}"))?;
    }
    let modules = load_modules().map_err(|error| format!("cannot read {MODULES}: {error}"))?;
    let line = fs::read_to_string("/proc/cmdline").map_err(|error| format!("no command line: {error}"))?;
    let mut console = Console::open().map_err(|error| format!("no second serial port: {error}"))?;
    let mut work = Work::new(&line)?;
    let ready = Line::Ready([("modules", modules)].into());
    console.say(&ready).and_then(|()| work.go_on(&mut console)).map_err(|error| format!("console: {error}"))
}

/// Loads the modules in the order of their names and counts them. One that this kernel will not have is named and left out.
fn load_modules() -> io::Result<u64> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(MODULES)?.map(|file| Ok(file?.path())).collect::<io::Result<_>>()?;
    paths.sort();
    let mut loaded = 0;
    for path in paths {
        match finit_module(File::open(&path)?, c"", 0) {
            Ok(()) => loaded += 1,
            Err(error) => eprintln!("plimsoll-stock-init: {}: {error}", path.display()),
        }
    }
    Ok(loaded)
}

/// The value of a parameter of the command line that is for this program.
fn parameter<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_ascii_whitespace().find_map(|word| {
        let (key, value) = word.strip_prefix(PARAMETER)?.split_once('=')?;
        (key == name).then_some(value)
    })
}
