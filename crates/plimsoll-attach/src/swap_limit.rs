//! Whether a process's cgroup leaves it any swap. Text of /proc enters, the directory of the cgroup that forbids it
//! leaves. What cannot be found out forbids nothing: paging then fails harmlessly and is seen to.

use plimsoll_sys::ProcessId;
use std::fs;
use std::path::{Path, PathBuf};

/// How a file is read; `None` if it cannot be.
type Read<'a> = dyn Fn(&Path) -> Option<String> + 'a;

/// The cgroup that forbids swap to the process, itself or one above it.
pub fn swap_forbidden_by(process: ProcessId) -> Option<PathBuf> {
    let membership = fs::read_to_string(format!("/proc/{}/cgroup", process.get())).ok()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    forbidden(&membership, &mounts, &|path| fs::read_to_string(path).ok())
}

fn forbidden(membership: &str, mounts: &str, read: &Read<'_>) -> Option<PathBuf> {
    membership.lines().find_map(|line| {
        // HIERARCHY:CONTROLLERS:PATH; version 2 is hierarchy 0 and lists no controllers.
        let mut columns = line.splitn(3, ':');
        let (_, controllers, path) = (columns.next()?, columns.next()?, columns.next()?);
        let is_memory = controllers.split(',').any(|name| name == "memory");
        let (wanted, forbids): (_, fn(&Path, &Read<'_>) -> bool) = match controllers {
            "" => ("cgroup2", forbids_v2),
            _ if is_memory => ("cgroup", forbids_v1),
            _ => return None,
        };
        let (root, point) = mounts.lines().find_map(|line| mount(line, wanted))?;
        let below = Path::new(path).strip_prefix(root).ok()?;
        let own = if below.as_os_str().is_empty() { point.to_path_buf() } else { point.join(below) };
        let above = own.ancestors().take_while(|directory| directory.starts_with(point));
        above.into_iter().find(|directory| forbids(directory, read)).map(Path::to_path_buf)
    })
}

/// The root and the place of a mount of that type: `ID PARENT DEV ROOT POINT OPTIONS … - TYPE SOURCE SUPEROPTIONS`.
fn mount<'a>(line: &'a str, wanted: &str) -> Option<(&'a str, &'a Path)> {
    let (head, tail) = line.split_once(" - ")?;
    let mut columns = head.split(' ').skip(3);
    let (root, point) = (columns.next()?, columns.next()?);
    let mut columns = tail.split(' ');
    let is_wanted = columns.next() == Some(wanted);
    let has_memory = wanted == "cgroup2" || columns.nth(1)?.split(',').any(|option| option == "memory");
    (is_wanted && has_memory).then_some((root, Path::new(point)))
}

fn forbids_v2(directory: &Path, read: &Read<'_>) -> bool {
    read(&directory.join("memory.swap.max")).is_some_and(|limit| limit.trim() == "0")
}

/// Version 1 limits memory, and memory and swap together.
fn forbids_v1(directory: &Path, read: &Read<'_>) -> bool {
    let number = |file| read(&directory.join(file))?.trim().parse::<u64>().ok();
    let (memory, both) = (number("memory.limit_in_bytes"), number("memory.memsw.limit_in_bytes"));
    // Without a limit the kernel shows a multiple of the page size near 2^63.
    memory.is_some_and(|limit| limit < 1 << 62) && memory == both
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "33 32 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
        34 32 0:30 / /sys/fs/cgroup/memory rw,nosuid shared:1 - cgroup cgroup rw,memory\n";
    const V2: &str = "31 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";

    fn answer(membership: &str, mounts: &str, files: &[(&str, &str)]) -> Option<String> {
        let read = |path: &Path| {
            files.iter().find(|(name, _)| Path::new(name) == path).map(|(_, text)| (*text).to_owned())
        };
        forbidden(membership, mounts, &read).map(|path| path.display().to_string())
    }

    #[test]
    fn a_limit_of_none_anywhere_above_forbids_swap() {
        let file = "/sys/fs/cgroup/machine.slice/memory.swap.max";
        let of = |limit| answer("0::/machine.slice/web1.scope\n", V2, &[(file, limit)]);
        assert_eq!(of("0\n").as_deref(), Some("/sys/fs/cgroup/machine.slice"));
        assert_eq!(of("max\n"), None);
        assert_eq!(answer("0::/\n", V2, &[]), None);
    }

    #[test]
    fn equal_limits_of_version_1_forbid_swap() {
        let of = |memory, both| {
            let base = "/sys/fs/cgroup/memory/web1";
            let (memory_file, both_file) =
                (format!("{base}/memory.limit_in_bytes"), format!("{base}/memory.memsw.limit_in_bytes"));
            answer("5:cpu:/web1\n4:memory:/web1\n", V1, &[(&memory_file, memory), (&both_file, both)])
        };
        assert_eq!(of("1073741824\n", "1073741824\n").as_deref(), Some("/sys/fs/cgroup/memory/web1"));
        assert_eq!(of("1073741824\n", "2147483648\n"), None);
        assert_eq!(of("9223372036854771712\n", "9223372036854771712\n"), None);
    }

    #[test]
    fn what_cannot_be_read_forbids_nothing() {
        assert_eq!(answer("garbage", "garbage", &[]), None);
        assert_eq!(answer("0::/x", "", &[]), None);
        assert_eq!(answer("4:memory:/x", V2, &[]), None);
    }
}
