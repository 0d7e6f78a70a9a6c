//! DAMON's directories as the kernel's documentation describes them, in memory: this machine's belong to somebody else.
use super::*;
use crate::system::FirstPage;
use plimsoll_sys::swap::{SwapError, SwapPriority};
use std::collections::BTreeMap;
use std::sync::Mutex;

const ROOT: &str = "/damon/kdamonds";
const BASE: u64 = 0x7f00_0000_0000;

/// Files by path, and a kernel behind them.
struct Fake {
    files: Mutex<BTreeMap<PathBuf, String>>,
    operations: &'static str,
    /// What it will have seen used.
    hot: Vec<(u64, u64)>,
    /// A file that cannot be written.
    broken: Option<&'static str>,
    writes: Mutex<Vec<String>>,
}

impl Fake {
    fn new(monitors: &str) -> Self {
        let files = Mutex::new([(Path::new(ROOT).join(NUMBER), format!("{monitors}\n"))].into());
        let (hot, writes) = (Vec::new(), Mutex::default());
        Self { files, operations: "vaddr\nfvaddr\npaddr\n", hot, broken: None, writes }
    }

    fn file(&self, path: &str) -> Option<String> {
        self.files.lock().unwrap().get(&Path::new(ROOT).join(path)).cloned()
    }

    fn is_as_before(&self) -> bool {
        let files = self.files.lock().unwrap();
        files.len() == 1 && files.values().all(|text| text.trim() == "0")
    }

    /// The files that appear when a number is written.
    fn grow(
        files: &mut BTreeMap<PathBuf, String>,
        folder: &Path,
        count: usize,
        names: &[&str],
        operations: &str,
    ) {
        let is_numbered = |path: &Path| {
            let name = path.strip_prefix(folder).ok().and_then(|path| path.iter().next()?.to_str());
            name.is_some_and(|name| name.parse::<u32>().is_ok())
        };
        files.retain(|path, _| !is_numbered(path));
        for place in 0..count {
            for name in names {
                let text = if *name == "avail_operations" { operations } else { "0\n" };
                files.insert(folder.join(place.to_string()).join(name), text.to_owned());
            }
        }
    }

    fn command(&self, files: &mut BTreeMap<PathBuf, String>, state: &Path, text: &str) -> io::Result<()> {
        let refused = || io::Error::from(io::ErrorKind::InvalidInput);
        let is_on = files[state].trim() == "on";
        match text {
            "on" | "off" if is_on == (text == "on") => return Err(refused()),
            "on" | "off" => drop(files.insert(state.to_owned(), format!("{text}\n"))),
            "update_schemes_tried_regions" if is_on => {
                let folder = Path::new(ROOT).join("0").join(SCHEME).join("tried_regions");
                Self::grow(files, &folder, self.hot.len(), &["start", "end", "nr_accesses", "age"], "");
                files.insert(folder.join("total_bytes"), "7\n".to_owned());
                for (place, (start, end)) in self.hot.iter().enumerate() {
                    files.insert(folder.join(format!("{place}/start")), format!("{start}\n"));
                    files.insert(folder.join(format!("{place}/end")), format!("{end}\n"));
                }
            }
            _ => return Err(refused()),
        }
        Ok(())
    }
}

impl System for Fake {
    fn read(&self, path: &Path) -> io::Result<String> {
        self.files.lock().unwrap().get(path).cloned().ok_or(io::ErrorKind::NotFound.into())
    }

    fn read_once(&self, path: &Path) -> io::Result<String> {
        self.read(path)
    }

    fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        let mut files = self.files.lock().unwrap();
        let name = path.strip_prefix(ROOT).unwrap().to_str().unwrap().to_owned();
        if !files.contains_key(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        if self.broken.is_some_and(|broken| name.ends_with(broken)) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.writes.lock().unwrap().push(format!("{name}={text}"));
        if name.ends_with("state") {
            return self.command(&mut files, path, text);
        }
        files.insert(path.to_owned(), format!("{text}\n"));
        let inside: &[&str] = match path.file_name().unwrap().to_str().unwrap() {
            NUMBER => &["state", "pid", "contexts/nr_contexts"],
            "nr_contexts" => &[
                "avail_operations",
                "operations",
                "monitoring_attrs/intervals/sample_us",
                "monitoring_attrs/intervals/aggr_us",
                "monitoring_attrs/intervals/update_us",
                "monitoring_attrs/nr_regions/min",
                "monitoring_attrs/nr_regions/max",
                "targets/nr_targets",
                "schemes/nr_schemes",
            ],
            "nr_targets" => &["pid_target", "regions/nr_regions"],
            "nr_regions" => &["start", "end"],
            "nr_schemes" => &[
                "action",
                "access_pattern/sz/min",
                "access_pattern/sz/max",
                "access_pattern/nr_accesses/min",
                "access_pattern/nr_accesses/max",
                "access_pattern/age/min",
                "access_pattern/age/max",
            ],
            _ => return Ok(()),
        };
        let folder = path.parent().unwrap();
        Self::grow(&mut files, folder, text.parse().unwrap(), inside, self.operations);
        Ok(())
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<String>> {
        let files = self.files.lock().unwrap();
        let inside =
            files.keys().filter_map(|path| path.strip_prefix(directory).ok()?.iter().next()?.to_str());
        let mut names: Vec<String> = inside.map(str::to_owned).collect();
        names.dedup();
        Ok(names)
    }

    fn exists(&self, path: &Path) -> bool {
        self.files.lock().unwrap().contains_key(path)
    }

    fn first_page(&self, _: &Path, _: u64) -> io::Result<FirstPage> {
        unreachable!("no disk is asked for")
    }

    fn write_first_page(&self, _: &Path, _: u64, _: &FirstPage) -> io::Result<()> {
        unreachable!("no disk is asked for")
    }

    fn swapon(&self, _: &Path, _: SwapPriority) -> Result<(), SwapError> {
        unreachable!("no swap is asked for")
    }

    fn swapoff(&self, _: &Path) -> Result<(), SwapError> {
        unreachable!("no swap is asked for")
    }
}

fn layout() -> Layout {
    let range = |start: u64, mib| HvaRange::new(Hva(start), ByteCount::mib(mib)).unwrap();
    Layout::new(vec![range(BASE, 64), range(BASE + (1 << 30), 32)]).unwrap()
}

fn open<'a>(fake: &'a Fake) -> Result<Damon<'a>, SourceError> {
    Damon::open_at(fake, ROOT.as_ref(), ProcessId::new(4242).unwrap(), &layout())
}

#[test]
fn what_lies_in_used_regions_and_in_the_machine_is_counted_and_nothing_is_left() {
    let mut fake = Fake::new("0");
    let second = BASE + (1 << 30);
    // One within the first range, one that begins before the second and ends in it, one elsewhere.
    fake.hot = vec![(BASE + 4096, BASE + 5 * 4096), (second - 4096, second + 2 * 4096), (0x1000, 0x9000)];
    let mut damon = open(&fake).unwrap();
    for (file, value) in [
        ("0/contexts/0/operations", "fvaddr"),
        ("0/contexts/0/targets/0/pid_target", "4242"),
        ("0/contexts/0/targets/0/regions/1/start", &*second.to_string()),
        ("0/contexts/0/targets/0/regions/1/end", &*(second + (32 << 20)).to_string()),
        ("0/contexts/0/schemes/0/action", "stat"),
        ("0/contexts/0/schemes/0/access_pattern/nr_accesses/min", "1"),
        ("0/state", "0"),
    ] {
        assert_eq!(fake.file(file).unwrap().trim(), value, "{file}");
    }
    for _ in 0..2 {
        damon.begin().unwrap();
        assert_eq!(fake.file("0/state").unwrap().trim(), "on");
        assert_eq!(damon.end().unwrap(), Some(PageCount(6)));
        assert_eq!(fake.file("0/state").unwrap().trim(), "off");
    }
    // Given up in the middle of a period.
    damon.begin().unwrap();
    drop(damon);
    assert!(fake.is_as_before(), "{:?}", fake.files);
}

#[test]
fn the_whole_address_space_is_monitored_where_ranges_cannot_be() {
    let fake = Fake { operations: "vaddr\npaddr\n", ..Fake::new("0") };
    let damon = open(&fake).unwrap();
    assert_eq!(fake.file("0/contexts/0/operations").unwrap().trim(), "vaddr");
    drop(damon);
    assert!(fake.is_as_before());
}

#[test]
fn a_monitor_of_somebody_elses_is_not_touched() {
    let fake = Fake::new("1");
    let error = open(&fake).err().unwrap();
    assert!(matches!(&error, SourceError::DamonTaken { monitors } if monitors == "1"), "{error}");
    assert!(fake.writes.lock().unwrap().is_empty());
}

#[test]
fn a_kernel_that_monitors_no_address_spaces_is_left_as_it_was() {
    let fake = Fake { operations: "paddr\n", ..Fake::new("0") };
    assert!(matches!(open(&fake).err(), Some(SourceError::NoVirtualAddresses)));
    assert!(fake.is_as_before());
    let without = Fake { files: Mutex::default(), ..Fake::new("0") };
    assert!(matches!(open(&without).err(), Some(SourceError::NoDamon)));
}

#[test]
fn a_monitor_that_cannot_be_set_up_is_removed() {
    for broken in ["sample_us", "pid_target", "regions/1/end", "nr_schemes", "operations"] {
        let fake = Fake { broken: Some(broken), ..Fake::new("0") };
        let error = open(&fake).err().unwrap();
        assert!(matches!(&error, SourceError::Damon { path, .. } if path.ends_with(broken)), "{error}");
        assert!(fake.is_as_before(), "{broken}: {:?}", fake.files);
    }
}
