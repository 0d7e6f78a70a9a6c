//! What the tests need from this machine, and hypervisors run to their end.
use plimsoll_guest::abi::{PAGE_SIZE, WORKLOAD_GPA};
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_metal::wire::{GuestLine, HostLine, Line, ProgramKind};
use plimsoll_metal::{Event, Guest, Options, Run};
use plimsoll_types::ByteCount;
use std::time::Duration;

/// How long a hypervisor may be silent. It boots in a second; other tests may run beside it.
const PATIENCE: Duration = Duration::from_secs(240);

/// Whether there is a QEMU here.
pub(crate) fn can() -> bool {
    is_here("qemu-system-x86_64", "qemu")
}

/// Whether there is such a program here. Says so if not, and insists where a capability that it belongs to must be.
pub(crate) fn is_here(program: &str, capability: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_here = std::env::split_paths(&path).any(|folder| folder.join(program).exists());
    let required = std::env::var("PLIMSOLL_REQUIRE").unwrap_or_default();
    let is_required = required.split(',').any(|name| name == capability);
    assert!(is_here || !is_required, "{capability} is required and {program} is not here");
    if !is_here {
        println!("SKIPPED: no {program}");
    }
    is_here
}

/// All that a hypervisor said, and how it ended.
#[derive(Debug)]
pub(crate) struct Heard {
    pub(crate) said: Vec<String>,
    pub(crate) report: Vec<Line>,
    pub(crate) end: Event,
}

impl Heard {
    /// Whether one of the lines contains the text.
    pub(crate) fn has(&self, text: &str) -> bool {
        self.said.iter().any(|line| line.contains(text))
    }

    /// What was reported of the guests.
    pub(crate) fn guests(&self) -> impl Iterator<Item = &GuestLine> {
        self.report.iter().filter_map(|line| if let Line::Guest(guest) = line { Some(guest) } else { None })
    }

    /// What was reported of the host.
    pub(crate) fn host(&self) -> &HostLine {
        let mut hosts =
            self.report.iter().filter_map(|line| if let Line::Host(host) = line { Some(host) } else { None });
        hosts.next().unwrap_or_else(|| panic!("no report of the host: {self:#?}"))
    }

    /// Checks that the hypervisor did as it should, whatever became of guests: no failure, no more memory than there is, and every frame
    /// given back.
    pub(crate) fn assert_sound(&self) {
        assert!(matches!(self.end, Event::Done), "{self:#?}");
        let failures = self.report.iter().any(|line| matches!(line, Line::Failure { .. }));
        assert!(!failures && !self.has("failure"), "{self:#?}");
        assert!(self.host().peak_bytes <= self.host().budget_bytes, "{self:#?}");
        assert!(self.has("returned: all but 0 "), "{self:#?}");
    }

    /// Checks that all went as it should: beside that, no wrong word and no death.
    pub(crate) fn assert_well(&self) {
        self.assert_sound();
        for guest in self.guests() {
            assert_eq!((guest.wrong_words, guest.anomalies, &guest.died), (0, 0, &None), "{self:#?}");
            assert!(guest.verified_pages > 0, "{self:#?}");
        }
    }
}

/// Runs a hypervisor to its end.
pub(crate) fn run(options: &Options) -> Heard {
    let mut run = Run::start(options).unwrap();
    let (mut said, mut report) = (Vec::new(), Vec::new());
    loop {
        match run.next(PATIENCE) {
            Ok(Event::Said(line)) => said.push(line),
            Ok(Event::Report(line)) => report.push(*line),
            Ok(end) => return Heard { said, report, end },
            Err(error) => panic!("{error} after {said:#?}; {}", run.complaints()),
        }
    }
}

/// A guest of one region that fills so many percent of it.
pub(crate) fn guest(kind: WorkloadKind, size: ByteCount, percent: u64, seed: u64) -> Guest {
    let mut workload = WorkloadSpec::new(kind);
    workload.footprint_bytes = (size.0 - WORKLOAD_GPA) / 100 * percent / PAGE_SIZE * PAGE_SIZE;
    workload.hot_permille = 200;
    workload.final_check = 1;
    workload.seed = seed;
    Guest::new(format!("{}{seed}", kind.name()), size, seed, workload)
}

/// One with 16 MiB of the program that calls, in the role that the seed names.
pub(crate) fn caller(name: &str, seed: u64) -> Guest {
    let guest = guest(WorkloadKind::Idle, ByteCount::mib(16), 10, seed);
    Guest { program: ProgramKind::CALLER, name: name.to_owned(), ..guest }
}

/// A guest that needs more memory than a machine of 40 MiB has, for as long as the others work.
pub(crate) fn greedy() -> Guest {
    guest(WorkloadKind::Sweep, ByteCount::mib(64), 85, 1)
}
