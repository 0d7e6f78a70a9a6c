//! What a process runs: its program's path and class, its arguments, its open files, its parent. Enters: a process id.
//! Leaves: what it says at this moment; a process can exec between two looks, so compare before believing.

use super::{Lines, ProcfsError, StartTime, failed, number, path, read};
use crate::ProcessId;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::PathBuf;

/// Set in a kernel thread's flags (PF_KTHREAD, linux/sched.h).
const KERNEL_THREAD: u64 = 0x0020_0000;

/// The width of a program's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElfClass {
    /// 32 bits.
    Bits32,
    /// 64 bits.
    Bits64,
    /// Not an ELF file, or of an unknown class.
    Unknown,
}

/// What /proc/PID/stat says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// The parent, or `None` if it lies outside of this process-id namespace.
    pub parent: Option<ProcessId>,
    /// The kernel's PF_ flags.
    pub flags: u64,
    /// When it started.
    pub start: StartTime,
}

impl Stat {
    /// True for a thread of the kernel, which has no program and no memory of its own.
    pub const fn is_kernel_thread(self) -> bool {
        self.flags & KERNEL_THREAD != 0
    }
}

/// Reads /proc/PID/stat.
pub fn stat(process: ProcessId) -> Result<Stat, ProcfsError> {
    parse_stat(&read(process, "stat")?)
}

/// Parses the text of a stat file, whose columns after the name's are counted from 3.
pub fn parse_stat(text: &str) -> Result<Stat, ProcfsError> {
    let file = "stat";
    let columns: Vec<&str> = match text.rsplit_once(')') {
        Some((_, rest)) => rest.split_ascii_whitespace().collect(),
        None => Vec::new(),
    };
    let column = |place: usize, field| {
        let word = columns.get(place - 3).ok_or(ProcfsError::Missing { file, field })?;
        number(file, field, word)
    };
    let parent = u32::try_from(column(4, "ppid")?).ok().and_then(ProcessId::new);
    Ok(Stat { parent, flags: column(9, "flags")?, start: StartTime(column(22, "starttime")?) })
}

/// The process that a thread belongs to; a process's first thread has its number.
pub fn thread_group(thread: ProcessId) -> Result<ProcessId, ProcfsError> {
    let (file, field) = ("status", "Tgid");
    let text = read(thread, file)?;
    let group: u32 = Lines { file, text: &text }.parsed(field)?;
    ProcessId::new(group).ok_or(ProcfsError::Malformed { file, field, found: group.to_string() })
}

/// The path of the program it runs, as this process's root sees it; ` (deleted)` follows when the file was replaced.
/// Needs the right to ptrace the process. A kernel thread has none and seems to be gone.
pub fn executable(process: ProcessId) -> Result<PathBuf, ProcfsError> {
    fs::read_link(path(process, "exe")).map_err(|source| failed(process, "exe", source))
}

/// The class of the program it runs, also when the file was removed.
pub fn elf_class(process: ProcessId) -> Result<ElfClass, ProcfsError> {
    let failed = |source| failed(process, "exe", source);
    let mut header = [0; 5];
    match File::open(path(process, "exe")).map_err(failed)?.read_exact(&mut header) {
        Ok(()) => Ok(class_of(header)),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(ElfClass::Unknown),
        Err(error) => Err(failed(error)),
    }
}

/// The fifth byte of an ELF header, after its magic number, is its class.
fn class_of(header: [u8; 5]) -> ElfClass {
    match header {
        [0x7f, b'E', b'L', b'F', 1] => ElfClass::Bits32,
        [0x7f, b'E', b'L', b'F', 2] => ElfClass::Bits64,
        _ => ElfClass::Unknown,
    }
}

/// The arguments, the program's name first, as far as the process has not overwritten them. Empty for a kernel thread
/// and for a process that is exiting.
pub fn arguments(process: ProcessId) -> Result<Vec<String>, ProcfsError> {
    Ok(split_arguments(&read(process, "cmdline")?))
}

/// The number of its real user.
pub fn user(process: ProcessId) -> Result<u32, ProcfsError> {
    let file = "status";
    let [real, ..] = Lines { file, text: &read(process, file)? }.ids("Uid")?;
    Ok(real)
}

/// The paths of the control groups it is in, of whatever hierarchy, as this process's namespace sees them; each once.
pub fn control_groups(process: ProcessId) -> Result<Vec<String>, ProcfsError> {
    let mut paths = parse_control_groups(&read(process, "cgroup")?);
    paths.sort();
    paths.dedup();
    Ok(paths)
}

/// Each line is a hierarchy's number, its controllers, and a path, which may have colons.
fn parse_control_groups(text: &str) -> Vec<String> {
    text.lines().filter_map(|line| Some(line.splitn(3, ':').nth(2)?.to_owned())).collect()
}

/// Splits what cmdline holds: each argument ends with a zero byte.
pub fn split_arguments(text: &str) -> Vec<String> {
    let text = text.strip_suffix('\0').unwrap_or(text);
    if text.is_empty() { Vec::new() } else { text.split('\0').map(str::to_owned).collect() }
}

/// What its descriptors refer to, as the kernel names it: a path, `socket:[…]`, `anon_inode:…`. Needs the right to
/// ptrace the process. Descriptors that close while this looks are left out.
pub fn open_files(process: ProcessId) -> Result<Vec<String>, ProcfsError> {
    let failed = |source| failed(process, "fd", source);
    let mut targets = Vec::new();
    for entry in fs::read_dir(path(process, "fd")).map_err(failed)? {
        match fs::read_link(entry.map_err(failed)?.path()) {
            Ok(target) => targets.push(target.to_string_lossy().into_owned()),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(targets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_gives_parent_flags_and_start() {
        let text = "7 (a) b) S 1 7 7 0 -1 2097216 0 0 0 0 0 0 0 0 20 0 1 0 555 0";
        let stat = parse_stat(text).unwrap();
        assert_eq!((stat.parent, stat.start), (ProcessId::new(1), StartTime(555)));
        assert!(stat.is_kernel_thread());
        assert_eq!(parse_stat(&text.replace(" 1 7 7", " 0 7 7")).unwrap().parent, None);
        assert!(matches!(parse_stat("7 (a) S 1"), Err(ProcfsError::Missing { field: "flags", .. })));
    }

    #[test]
    fn users_and_control_groups_are_this_processs() {
        let own = ProcessId::own();
        assert_eq!(user(own).unwrap(), rustix::process::getuid().as_raw());
        assert!(control_groups(own).unwrap().iter().all(|path| path.starts_with('/')));
        let text = "12:memory:/a:b\n1:name=systemd:/a:b\n0::/\nnonsense\n";
        assert_eq!(parse_control_groups(text), ["/a:b", "/a:b", "/"]);
    }

    #[test]
    fn arguments_may_be_empty_strings() {
        assert_eq!(split_arguments("qemu\0-name\0\0"), ["qemu", "-name", ""]);
        assert_eq!(split_arguments("renamed without an end"), ["renamed without an end"]);
        assert!(split_arguments("").is_empty());
    }

    #[test]
    fn this_test_is_a_64_bit_program_with_an_open_file() {
        let own = ProcessId::own();
        let file = File::open("/proc/self/exe").unwrap();
        assert_eq!(executable(own).unwrap(), std::env::current_exe().unwrap());
        assert_eq!(elf_class(own).unwrap(), ElfClass::Bits64);
        assert_eq!(arguments(own).unwrap(), std::env::args().collect::<Vec<_>>());
        let name = std::env::current_exe().unwrap().to_string_lossy().into_owned();
        assert!(open_files(own).unwrap().contains(&name));
        assert_eq!(thread_group(own).unwrap(), own);
        drop(file);
    }

    #[test]
    fn the_class_is_read_from_the_header() {
        assert_eq!(class_of(*b"\x7fELF\x01"), ElfClass::Bits32);
        assert_eq!(class_of(*b"#!/bi"), ElfClass::Unknown);
    }
}
