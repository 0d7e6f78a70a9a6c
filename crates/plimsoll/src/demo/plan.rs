//! What the demo will run: from options to machines, or to the one sentence that says why not.
//!
//! Enters: options and what the host has. Leaves: a [`Plan`] whose guests can run within its budget, or an error that
//! names the option to change. Nothing is started here.
use super::DemoArgs;
use plimsoll_guest::abi;
use plimsoll_guest::content::Mix;
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_types::{BLOCK_SIZE, ByteCount, PAGE_SIZE};
use plimsoll_vmm::config::{AccelChoice, HugePages, Management, Prefault, VmmConfig, Workload};

/// What one machine costs beside its guest's pages: the VMM's own memory and KVM's page tables. Measured here as
/// 5 to 9 MiB for guests of 256 MiB; the tables grow with the guest.
const VMM_OVERHEAD: ByteCount = ByteCount::mib(8);
/// The least RAM in which a guest gets anywhere: its stacks and tables, and a block or two to work in.
const RESIDENT_MIN: ByteCount = ByteCount::mib(6);
/// What the manager takes before its first machine.
const MANAGER_OVERHEAD: ByteCount = ByteCount::mib(16);
/// Pages in the pool of pages that guests have in common.
const POOL_PAGES: u64 = 2048;
/// Stored bytes in a thousand of a text page: lz4 leaves 580, size classes and records take the rest.
const TEXT_PERMILLE: u64 = 640;
/// The same of a random page: raw, with its record.
const RANDOM_PERMILLE: u64 = 1010;
/// Without --budget the guests own this many tenths of it.
const OVERCOMMIT_TENTHS: u64 = 25;

/// What the guests of the demo do, in turn.
struct Role {
    name: &'static str,
    kind: WorkloadKind,
    /// Share of the guest's memory that it fills.
    footprint_percent: u64,
    hot_permille: u32,
    ops_per_second: u64,
}

const ROLES: [Role; 8] = [
    Role {
        name: "kv",
        kind: WorkloadKind::Zipf,
        footprint_percent: 70,
        hot_permille: 250,
        ops_per_second: 4000,
    },
    Role {
        name: "idle",
        kind: WorkloadKind::Idle,
        footprint_percent: 60,
        hot_permille: 100,
        ops_per_second: 0,
    },
    Role {
        name: "burst",
        kind: WorkloadKind::Bursts,
        footprint_percent: 60,
        hot_permille: 60,
        ops_per_second: 0,
    },
    Role {
        name: "phase",
        kind: WorkloadKind::Phases,
        footprint_percent: 60,
        hot_permille: 80,
        ops_per_second: 4000,
    },
    Role {
        name: "sweep",
        kind: WorkloadKind::Sweep,
        footprint_percent: 60,
        hot_permille: 100,
        ops_per_second: 4000,
    },
    Role {
        name: "idle",
        kind: WorkloadKind::Idle,
        footprint_percent: 70,
        hot_permille: 50,
        ops_per_second: 0,
    },
    Role {
        name: "kv",
        kind: WorkloadKind::Zipf,
        footprint_percent: 60,
        hot_permille: 150,
        ops_per_second: 2000,
    },
    Role {
        name: "idle",
        kind: WorkloadKind::Idle,
        footprint_percent: 60,
        hot_permille: 100,
        ops_per_second: 0,
    },
];

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) guests: Vec<VmmConfig>,
    pub(crate) budget: ByteCount,
    pub(crate) mix: Mix,
    pub(crate) seed: u64,
    pub(crate) seconds: u64,
    /// Whether pages in use that guests have in common are kept once.
    pub(crate) share: bool,
    /// What was changed to make it possible, for the reader.
    pub(crate) fitted: Vec<String>,
}

impl Plan {
    /// Memory of all guests.
    pub(crate) fn asked(&self) -> ByteCount {
        self.guests.iter().map(|guest| ByteCount(guest.ram_bytes)).sum()
    }

    /// The same guests as plain processes.
    pub(crate) fn unmanaged(&self) -> Vec<VmmConfig> {
        let plain = |guest: &VmmConfig| VmmConfig { management: Management::Unmanaged, ..guest.clone() };
        self.guests.iter().map(plain).collect()
    }
}

/// What the host has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostLimits {
    pub(crate) available: ByteCount,
    pub(crate) descriptors: u64,
}

/// Makes the plan.
pub(crate) fn plan(args: &DemoArgs, accel: AccelChoice, limits: HostLimits) -> Result<Plan, String> {
    let mix: Mix = args.mix.parse().map_err(|error| format!("--mix {}: {error}", args.mix))?;
    if args.guests == 0 {
        return Err("--guests 0: there is nothing to run; use at least 1".to_owned());
    }
    if args.seconds == 0 {
        return Err("--seconds 0: there is no time to run in; use at least 1".to_owned());
    }
    descriptors(args.guests, limits)?;
    let (size, mut fitted) = fit(args, limits)?;
    let guests: Vec<VmmConfig> = (0..args.guests).map(|nth| guest(args, nth, size, mix, accel)).collect();
    for guest in &guests {
        guest.check().map_err(|error| plimsoll_linux::explain(&error))?;
    }
    let need = need(&guests, mix);
    let budget = args.budget.unwrap_or_else(|| overcommitted(args.guests, size));
    if budget < need.total() && args.budget.is_some() {
        return Err(format!(
            "--budget {budget} is below what these guests need at least: {need}; raise --budget, or use fewer, smaller or more compressible guests"
        ));
    }
    // All memory is in place before its machine is handed over, and nobody can take any of it before that.
    let at_once =
        if args.prefault { ByteCount(size.0 * u64::from(args.guests)) + need.overhead } else { ByteCount(0) };
    if args.budget.is_some() && budget < at_once {
        return Err(format!(
            "--prefault puts all memory of the guests in place at once: that takes a --budget of {at_once}, not {budget}; or leave --prefault out"
        ));
    }
    // Without --budget it is ours to choose: few or small guests cannot be overcommitted as far.
    let chosen = budget.max(need.total()).max(at_once);
    if chosen > budget {
        let why = if chosen == at_once {
            "--prefault puts all memory in place at once".to_owned()
        } else {
            format!("these guests need at least {need}")
        };
        fitted.push(format!("the budget is {chosen} instead of {budget}, because {why}"));
    }
    let DemoArgs { seed, seconds, share, .. } = *args;
    Ok(Plan { guests, budget: chosen, mix, seed, seconds, share, fitted })
}

/// The budget when none is given.
fn overcommitted(guests: u32, size: ByteCount) -> ByteCount {
    let block = BLOCK_SIZE as u64;
    ByteCount(size.0.saturating_mul(u64::from(guests)) / OVERCOMMIT_TENTHS * 10 / block * block)
}

/// The guests' size, made smaller where the host is small, and what was changed.
fn fit(args: &DemoArgs, limits: HostLimits) -> Result<(ByteCount, Vec<String>), String> {
    let least = ByteCount(abi::WORKLOAD_GPA + 2 * BLOCK_SIZE as u64);
    let mut size = args.size;
    if size < least || !size.is_multiple_of(BLOCK_SIZE) {
        return Err(format!("--size {size}: a guest needs a multiple of 2M and at least {least}"));
    }
    let budget = |size| args.budget.unwrap_or_else(|| overcommitted(args.guests, size));
    // The host needs a little to live on, and a killed run's remains may not be gone yet.
    let room = ByteCount(limits.available.0 / 4 * 3);
    while budget(size) > room {
        let smaller = ByteCount(size.0 / 2 / BLOCK_SIZE as u64 * BLOCK_SIZE as u64);
        if args.budget.is_some() || smaller < ByteCount::mib(32) {
            return Err(format!(
                "a budget of {} does not fit this host, which has {} available; use a smaller --budget, --size or --guests",
                budget(size),
                limits.available
            ));
        }
        size = smaller;
    }
    let note = format!(
        "guests are {size} instead of {}, to fit the {} this host has available",
        args.size, limits.available
    );
    Ok((size, if size < args.size { vec![note] } else { Vec::new() }))
}

/// Refuses more guests than there are descriptors for.
pub(crate) fn descriptors(guests: u32, limits: HostLimits) -> Result<(), String> {
    // A socket pair, a control pair, two userfaultfds, a pidfd, words and an eventfd for each machine, and some of our
    // own.
    let needed = u64::from(guests) * 10 + 40;
    if needed > limits.descriptors {
        return Err(format!(
            "--guests {guests}: {needed} file descriptors are needed and {} are allowed; raise ulimit -n or use fewer guests",
            limits.descriptors
        ));
    }
    Ok(())
}

fn guest(args: &DemoArgs, nth: u32, size: ByteCount, mix: Mix, accel: AccelChoice) -> VmmConfig {
    let role = &ROLES[nth as usize % ROLES.len()];
    let mut spec = WorkloadSpec::new(role.kind);
    let usable = size.0 - abi::WORKLOAD_GPA;
    spec.footprint_bytes = usable / 100 * role.footprint_percent / PAGE_SIZE as u64 * PAGE_SIZE as u64;
    spec.hot_permille = role.hot_permille;
    spec.ops_per_second = role.ops_per_second;
    spec.final_check = 1;
    spec.seed = args.seed.wrapping_add(u64::from(nth));
    if role.kind == WorkloadKind::Bursts {
        spec.burst_ops = 5000;
    }
    let seed = args.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(u64::from(nth));
    let workload = Workload { spec, mix, seed, pool_seed: args.seed, pool_pages: POOL_PAGES };
    let mut config = VmmConfig::new(format!("{}{}", role.name, nth + 1), size.0, workload);
    config.vcpus = args.vcpus;
    config.accel = accel;
    if args.share {
        // Twins are sought page by page: huge pages are left alone.
        config.huge_pages = HugePages::Never;
    }
    config.prefault = if args.prefault { Prefault::All } else { Prefault::OnDemand };
    // Room for an eighth of the guest in limbo, in slots that may each be half used.
    config.airlock_slots = u32::try_from(size.0 / BLOCK_SIZE as u64 / 4).unwrap_or(u32::MAX).clamp(8, 512);
    config
}

/// The least memory in which the guests fit, by the arithmetic that a refusal shows.
pub(crate) struct Need {
    stored: ByteCount,
    resident: ByteCount,
    overhead: ByteCount,
}

impl Need {
    pub(crate) fn total(&self) -> ByteCount {
        self.stored + self.resident + self.overhead
    }
}

impl std::fmt::Display for Need {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { stored, resident, overhead } = self;
        write!(
            f,
            "{} = {stored} for their contents when stored + {resident} to run in + {overhead} of overhead",
            self.total()
        )
    }
}

pub(crate) fn need(guests: &[VmmConfig], mix: Mix) -> Need {
    let footprint: u64 = guests.iter().map(|guest| guest.workload.spec.footprint_bytes).sum();
    let permille = u64::from(mix.text) * TEXT_PERMILLE + u64::from(mix.random) * RANDOM_PERMILLE;
    let pool = if mix.duplicate > 0 { POOL_PAGES * PAGE_SIZE as u64 * TEXT_PERMILLE / 1000 } else { 0 };
    let count = guests.len() as u64;
    let tables: u64 = guests.iter().map(|guest| guest.ram_bytes / 200).sum();
    Need {
        stored: ByteCount(footprint / 100_000 * permille + pool),
        resident: ByteCount(RESIDENT_MIN.0 * count),
        overhead: ByteCount(MANAGER_OVERHEAD.0 + VMM_OVERHEAD.0 * count + tables),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        demo: DemoArgs,
    }

    fn planned(options: &str, available_mib: u64) -> Result<Plan, String> {
        let line = Line::parse_from(std::iter::once("demo").chain(options.split_ascii_whitespace()));
        let limits = HostLimits { available: ByteCount::mib(available_mib), descriptors: 1024 };
        plan(&line.demo, AccelChoice::Auto, limits)
    }

    #[test]
    fn by_default_eight_guests_own_two_and_a_half_times_the_budget() {
        let plan = planned("", 8192).unwrap();
        assert_eq!((plan.guests.len(), plan.asked()), (8, ByteCount::mib(2048)));
        assert!(plan.asked().0 * 10 / plan.budget.0 >= 25, "{}", plan.budget);
        assert!(plan.fitted.is_empty());
    }

    #[test]
    fn a_small_host_gets_smaller_guests_and_is_told() {
        let plan = planned("", 600).unwrap();
        assert!(plan.budget <= ByteCount::mib(450));
        assert_eq!(plan.guests[0].ram_bytes, 128 << 20);
        assert!(plan.fitted[0].contains("128M instead of 256M"), "{:?}", plan.fitted);
        assert!(planned("--budget 800M", 600).unwrap_err().contains("does not fit this host"));
    }

    #[test]
    fn memory_that_is_all_in_place_at_once_needs_a_budget_for_all_of_it() {
        let error = planned("--prefault --budget 900M", 8192).unwrap_err();
        assert!(error.contains("--prefault") && error.contains("a --budget of 2"), "{error}");
        let plan = planned("--prefault", 8192).unwrap();
        assert!(plan.budget > plan.asked());
        assert!(plan.fitted[0].contains("--prefault"), "{:?}", plan.fitted);
    }

    #[test]
    fn contents_that_cannot_shrink_are_refused_with_the_arithmetic() {
        let error = planned("--budget 818M --mix random=100", 8192).unwrap_err();
        assert!(error.contains("contents when stored") && error.contains("--budget 818M"), "{error}");
    }
}
