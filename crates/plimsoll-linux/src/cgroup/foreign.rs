//! The memory cgroup another process is in: what it may use, what it uses, and whether it may swap. Reads only.
//!
//! A process id enters; the kernel's numbers leave. A limit that is not set leaves as `None`, one that an ancestor sets as
//! if it were set here.
//!
//! **Whether it may swap.** With v2, the lowest `memory.swap.max` from the cgroup up to the root says how much. With v1, who
//! sets `memory.swappiness` to 0, or a limit on memory and swap (`memsw`), there or above, no higher than the one on memory,
//! wants no swapping there. The kernel heeds both in its own reclaim only, not when it is advised to page out (checked on Linux
//! 6.18): so it is up to us.
use super::{CgroupError, Home, Version, parse_count, read};
use plimsoll_sys::ProcessId;
use plimsoll_types::ByteCount;
use std::io;
use std::path::{Path, PathBuf};

/// What stands for "no limit" with v1: the largest number of pages, in bytes. Anything near it is none.
const V1_UNLIMITED: u64 = 1 << 62;

/// The memory cgroup of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessCgroup {
    home: Home,
}

/// What a cgroup's processes use and may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CgroupNumbers {
    /// Memory charged now.
    pub used: ByteCount,
    /// The most it may use.
    pub limit: Option<ByteCount>,
    /// Memory in swap, where the kernel counts it.
    pub swapped: Option<ByteCount>,
    /// Whether and how far it may swap.
    pub swap: SwapRight,
    /// How often it ran into its limit.
    pub limit_hits: u64,
    /// Processes in it that were killed for want of memory.
    pub oom_kills: u64,
}

/// How far a cgroup may swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SwapRight {
    /// As far as the host has swap.
    Free,
    /// So much in all.
    Limited(ByteCount),
    /// Not at all.
    Forbidden,
}

impl ProcessCgroup {
    /// Finds the one the process is in now.
    ///
    /// # Errors
    /// [`CgroupError::NoProcess`]; others when there is no memory controller, or its file system is not mounted here.
    pub fn of(process: ProcessId) -> Result<Self, CgroupError> {
        let path = format!("/proc/{}/cgroup", process.get());
        let cgroups = read(path.as_ref()).map_err(|error| match error {
            CgroupError::Other { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                CgroupError::NoProcess(process)
            }
            other => other,
        })?;
        Ok(Self { home: Home::parse(&cgroups, &read("/proc/self/mountinfo".as_ref())?)? })
    }

    /// One of v2 in that directory, without looking.
    #[cfg(test)]
    pub(crate) fn v2_at(path: &Path) -> Self {
        Self { home: Home { version: Version::V2, mount: path.to_owned(), path: path.to_owned() } }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.home.path
    }

    /// Its file of pressure stall information, which only v2 has.
    pub fn pressure(&self) -> Option<PathBuf> {
        (self.home.version == Version::V2).then(|| self.home.path.join("memory.pressure"))
    }

    /// Its numbers now.
    ///
    /// # Errors
    /// When a file cannot be read, for example because the cgroup was removed: the process has moved.
    pub fn numbers(&self) -> Result<CgroupNumbers, CgroupError> {
        match self.home.version {
            Version::V1 => self.numbers_v1(),
            Version::V2 => self.numbers_v2(),
        }
    }

    /// Memory charged now: one of [`numbers`](Self::numbers), for a fraction of the cost.
    ///
    /// # Errors
    /// As for [`numbers`](Self::numbers).
    pub fn used(&self) -> Result<ByteCount, CgroupError> {
        let file = self.home.version.pick("memory.usage_in_bytes", "memory.current");
        self.required(file, parse_plain)
    }

    /// Whether and how far it may swap: some of [`numbers`](Self::numbers), for less.
    ///
    /// # Errors
    /// As for [`numbers`](Self::numbers).
    pub fn swap_right(&self) -> Result<SwapRight, CgroupError> {
        match self.home.version {
            Version::V1 => {
                let stat = self.home.path.join("memory.stat");
                self.swap_right_of(&stat, &read(&stat)?)
            }
            Version::V2 => {
                let limits = self.up_to_root("memory.swap.max")?;
                Ok(match limits {
                    None => SwapRight::Free,
                    Some(ByteCount(0)) => SwapRight::Forbidden,
                    Some(limit) => SwapRight::Limited(limit),
                })
            }
        }
    }

    /// That of v1, from its memory.stat.
    fn swap_right_of(&self, stat: &Path, text: &str) -> Result<SwapRight, CgroupError> {
        // The kernel has done the walk to the root.
        let lowest = |name| Ok::<_, CgroupError>(parse_field(stat, text, name)?.filter(is_limit));
        let (limit, both) = (lowest("hierarchical_memory_limit")?, lowest("hierarchical_memsw_limit")?);
        let swappiness = self.required("memory.swappiness", parse_plain)?;
        Ok(swap_right_v1(limit, both, swappiness.0))
    }

    fn numbers_v1(&self) -> Result<CgroupNumbers, CgroupError> {
        let stat = self.home.path.join("memory.stat");
        let text = read(&stat)?;
        let field = |name| parse_field(&stat, &text, name);
        let kills = self.home.path.join("memory.oom_control");
        Ok(CgroupNumbers {
            used: self.required("memory.usage_in_bytes", parse_plain)?,
            // The kernel has done the walk to the root.
            limit: field("hierarchical_memory_limit")?.filter(is_limit),
            swapped: field("total_swap")?,
            swap: self.swap_right_of(&stat, &text)?,
            limit_hits: self.required("memory.failcnt", parse_plain)?.0,
            oom_kills: parse_field(&kills, &read(&kills)?, "oom_kill")?.map_or(0, |count| count.0),
        })
    }

    fn numbers_v2(&self) -> Result<CgroupNumbers, CgroupError> {
        let events = self.home.path.join("memory.events");
        let text = read(&events)?;
        let event =
            |name| Ok::<_, CgroupError>(parse_field(&events, &text, name)?.map_or(0, |count| count.0));
        Ok(CgroupNumbers {
            used: self.required("memory.current", parse_plain)?,
            limit: self.up_to_root("memory.max")?,
            swapped: self.optional("memory.swap.current", parse_plain)?,
            swap: self.swap_right()?,
            limit_hits: event("max")?,
            oom_kills: event("oom_kill")?,
        })
    }

    /// The lowest limit from the cgroup up to the root of its file system, which itself has none.
    fn up_to_root(&self, file: &str) -> Result<Option<ByteCount>, CgroupError> {
        let mut lowest: Option<ByteCount> = None;
        let within = self.home.path.ancestors().take_while(|path| path.starts_with(&self.home.mount));
        for directory in within {
            let limit = read_optional(&directory.join(file), parse_limit)?.flatten();
            lowest = lowest.into_iter().chain(limit).min();
        }
        Ok(lowest)
    }

    fn required<T>(&self, file: &str, parse: Parse<T>) -> Result<T, CgroupError> {
        let path = self.home.path.join(file);
        parse(&path, &read(&path)?)
    }

    fn optional<T>(&self, file: &str, parse: Parse<T>) -> Result<Option<T>, CgroupError> {
        read_optional(&self.home.path.join(file), parse)
    }
}

type Parse<T> = fn(&Path, &str) -> Result<T, CgroupError>;

/// `None` where there is no such file: the kernel was built, or booted, without.
fn read_optional<T>(path: &Path, parse: Parse<T>) -> Result<Option<T>, CgroupError> {
    match read(path) {
        Ok(text) => parse(path, &text).map(Some),
        Err(CgroupError::Other { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn parse_plain(path: &Path, text: &str) -> Result<ByteCount, CgroupError> {
    parse_count(path, "a number", text)
}

/// A number, `max`, or v1's largest number.
fn parse_limit(path: &Path, text: &str) -> Result<Option<ByteCount>, CgroupError> {
    if text.trim() == "max" {
        return Ok(None);
    }
    Ok(Some(parse_count(path, "a limit", text)?).filter(is_limit))
}

const fn is_limit(limit: &ByteCount) -> bool {
    limit.0 < V1_UNLIMITED
}

fn parse_field(path: &Path, text: &str, name: &str) -> Result<Option<ByteCount>, CgroupError> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map(|value| parse_plain(path, value)).transpose()
}

fn swap_right_v1(limit: Option<ByteCount>, both: Option<ByteCount>, swappiness: u64) -> SwapRight {
    match (limit, both) {
        _ if swappiness == 0 => SwapRight::Forbidden,
        (Some(limit), Some(both)) if both <= limit => SwapRight::Forbidden,
        (limit, Some(both)) => SwapRight::Limited(both.saturating_sub(limit.unwrap_or_default())),
        (_, None) => SwapRight::Free,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{FakeV2, cgroup_or_skip};
    use super::*;
    use crate::cgroup::Swappiness;

    fn limits(texts: [&str; 3]) -> SwapRight {
        let limit = |text| parse_limit("x".as_ref(), text).unwrap();
        swap_right_v1(limit(texts[0]), limit(texts[1]), parse_plain("x".as_ref(), texts[2]).unwrap().0)
    }

    #[test]
    fn with_v1_swappiness_and_the_common_limit_forbid_swap() {
        let unlimited = "9223372036854771712\n";
        assert_eq!(limits([unlimited, unlimited, "60\n"]), SwapRight::Free);
        assert_eq!(limits([unlimited, unlimited, "0\n"]), SwapRight::Forbidden);
        assert_eq!(limits(["1048576\n", unlimited, "60\n"]), SwapRight::Free);
        assert_eq!(limits(["1048576\n", "1048576\n", "60\n"]), SwapRight::Forbidden);
        assert_eq!(limits(["1048576\n", "1052672\n", "60\n"]), SwapRight::Limited(ByteCount(4096)));
        assert!(parse_limit("x".as_ref(), "many").is_err());
    }

    #[test]
    fn with_v2_the_lowest_limit_up_to_the_root_counts() {
        let tree = FakeV2::new("v2-foreign");
        let cgroup = ProcessCgroup { home: tree.home() };
        let inner = "a.slice/b.scope";
        for (file, text) in [
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.swap.max", "max\n"),
            ("memory.swap.current", "8192\n"),
            ("memory.events", "low 0\nhigh 1\nmax 7\noom 2\noom_kill 3\noom_group_kill 0\n"),
        ] {
            tree.put(&format!("{inner}/{file}"), text);
        }
        tree.put("a.slice/memory.max", "16384\n");
        let numbers = cgroup.numbers().unwrap();
        let expected = CgroupNumbers {
            used: ByteCount(4096),
            limit: Some(ByteCount(16384)),
            swapped: Some(ByteCount(8192)),
            swap: SwapRight::Free,
            limit_hits: 7,
            oom_kills: 3,
        };
        assert_eq!(numbers, expected);
        tree.put("a.slice/memory.swap.max", "65536\n");
        assert_eq!(cgroup.swap_right().unwrap(), SwapRight::Limited(ByteCount(65536)));
        tree.put(&format!("{inner}/memory.swap.max"), "0\n");
        assert_eq!(cgroup.swap_right().unwrap(), SwapRight::Forbidden);
        assert!(cgroup.pressure().unwrap().ends_with("b.scope/memory.pressure"));
    }

    #[test]
    fn the_cgroup_of_a_running_process_is_found_and_read() {
        let Some(own) = cgroup_or_skip("plimsoll-test-foreign") else { return };
        let mut child = crate::procsum::test_child::TestChild::start("hold");
        own.enter(child.id()).unwrap();
        own.set_limit(ByteCount::mib(256)).unwrap();
        child.ask("take", "taken");
        let cgroup = ProcessCgroup::of(child.id()).unwrap();
        assert_eq!(cgroup.path(), own.path());
        let numbers = cgroup.numbers().unwrap();
        assert!(numbers.used >= ByteCount::mib(64), "{numbers:?}");
        assert_eq!((numbers.limit, numbers.oom_kills), (Some(ByteCount::mib(256)), 0));
        if own.set_swappiness(Swappiness::new(0).unwrap()).is_ok() {
            assert_eq!(cgroup.swap_right().unwrap(), SwapRight::Forbidden);
        }
        let id = child.id();
        child.kill();
        assert!(matches!(ProcessCgroup::of(id), Err(CgroupError::NoProcess(_))));
        own.remove().unwrap();
    }
}
