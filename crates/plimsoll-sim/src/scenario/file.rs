//! How a scenario is written.
//!
//! Enters: TOML. Leaves: a scenario with everything that was left out filled in, each default beside its key below.
//! Unknown keys are refused, so that a mistyped one is not silently the default. What a value contradicts is said at the
//! line of the later of the two.
use super::words::{As, Nanos, Times};
use super::{Hosts, Order, Placement, Restart, Scenario, ScenarioError};
use crate::demand::{Curve, Locality};
use crate::machine::{Begin, Boot, Class, Estimator, Keeper, Physics};
use crate::time::Millis;
use crate::trace::{Record, TraceError};
use plimsoll_policy::admission::{Capacity, Overheads};
use plimsoll_policy::auction::{IdleTax, PAGES_MAX};
use plimsoll_policy::costs::{Cost, CostsFile};
use plimsoll_policy::host_state::min_free;
use plimsoll_policy::settings::{
    BUFFER_USUAL, Face, GroupSettings, Owner, STALL_OBJECTIVE_USUAL, SettingsError, Shares, Terms,
};
use plimsoll_policy::tree::Tree;
use plimsoll_policy::{Costs, Ppm, Rung, Rungs};
use plimsoll_types::{ByteCount, DomainId, GroupId, MachineId, PageCount};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use toml::Spanned;

/// The most machines of a scenario, which take about a kilobyte each before anything runs.
const MACHINES_MAX: u64 = 1 << 24;
/// The most hosts.
const HOSTS_MAX: u32 = 1 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    title: String,
    #[serde(default = "one")]
    seed: u64,
    #[serde(default = "day")]
    duration: Spanned<As<Millis>>,
    hosts: HostsTable,
    #[serde(default)]
    placement: PlacementTable,
    #[serde(default)]
    costs: CostsTable,
    #[serde(default)]
    estimator: EstimatorTable,
    idle_tax: Option<Spanned<As<Ppm>>>,
    #[serde(default)]
    group: Vec<GroupTable>,
    class: Vec<ClassTable>,
    #[serde(default)]
    restart: Vec<RestartTable>,
}

fn one() -> u64 {
    1
}

fn day() -> Spanned<As<Millis>> {
    Spanned::new(0..0, As(crate::time::DAY))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HostsTable {
    count: Spanned<u32>,
    memory: Spanned<As<ByteCount>>,
    /// What the host uses itself. Default: 1G.
    own: Option<As<ByteCount>>,
    #[serde(default)]
    overheads: OverheadsTable,
}

/// Default: what was measured.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct OverheadsTable {
    tables_per_page: Option<u16>,
    page_tables_per_page: Option<u16>,
    store_per_page: Option<u16>,
    vmm: Option<As<ByteCount>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct PlacementTable {
    /// Default: spread.
    policy: Option<Order>,
    /// Default: as far as guarantees fit.
    overcommit: Option<As<Times>>,
    /// Default: 10m.
    within: Option<As<Millis>>,
}

/// Default: what was measured.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct CostsTable {
    /// What `cargo xtask bench cost` has written; its place is seen from the scenario's. What is said beside it counts more.
    file: Option<Spanned<String>>,
    guest_free: Option<CostTable>,
    balloon: Option<CostTable>,
    sharing: Option<CostTable>,
    compress: Option<CostTable>,
    disk: Option<CostTable>,
    /// Default: 5%, what came back of what `plimsoll attach` took from an idle Debian in twenty seconds (README).
    mistakes: Option<As<Ppm>>,
    /// Default: 4.
    threads: Option<Spanned<u64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CostTable {
    take: Option<As<Nanos>>,
    back: Option<As<Nanos>>,
    keeps: Option<Spanned<As<Ppm>>>,
}

/// Default: ESX's, 100 samples in 60 seconds.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct EstimatorTable {
    period: Option<Spanned<As<Millis>>>,
    samples: Option<Spanned<u32>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupTable {
    name: Spanned<String>,
    parent: Option<Spanned<String>>,
    reservation: Option<As<ByteCount>>,
    limit: Option<As<ByteCount>>,
    shares: Option<u32>,
    /// Its machines may share pages. Default: no.
    #[serde(default)]
    sharing: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ClassTable {
    name: Spanned<String>,
    count: Spanned<u32>,
    group: Option<Spanned<String>>,
    memory: Spanned<MemoryTable>,
    demand: Spanned<DemandTable>,
    /// What the guest keeps contents in. Default: what it is active in, and without `guest-free` also what it was.
    keeps: Option<Spanned<As<PageCount>>>,
    /// Default: guest-free, compress and disk.
    rungs: Option<Vec<As<Rung>>>,
    /// Default: disk.
    highest: Option<As<Rung>>,
    /// Default: 0.1%.
    stall_objective: Option<As<Ppm>>,
    /// Default: 20000 a second.
    touches: Option<u64>,
    /// Zipf's exponent in percent. Default: 80%.
    skew: Option<Spanned<As<Ppm>>>,
    /// A second. Default: 64M, a quarter of what one processor can touch for the first time (17 us a page, FACTS).
    grows: Option<As<PageCount>>,
    /// Default: 2.
    processors: Option<Spanned<u64>>,
    /// Default: nothing.
    twins: Option<Spanned<As<Ppm>>>,
    boot: Option<BootTable>,
}

/// Memory in one of the faces of [`Face`].
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct MemoryTable {
    size: Option<As<ByteCount>>,
    reservation: Option<As<ByteCount>>,
    limit: Option<As<ByteCount>>,
    shares: Option<u32>,
    startup: Option<As<ByteCount>>,
    minimum: Option<As<ByteCount>>,
    maximum: Option<As<ByteCount>>,
    buffer: Option<As<Ppm>>,
    weight: Option<u32>,
    r#static: Option<As<ByteCount>>,
    dedicated: Option<As<ByteCount>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
enum DemandTable {
    Idle {},
    Constant {
        active: As<PageCount>,
    },
    Daily {
        low: As<PageCount>,
        high: As<PageCount>,
        peak: As<Millis>,
        jitter: Option<As<Millis>>,
    },
    Bursts {
        low: As<PageCount>,
        high: As<PageCount>,
        every: As<Millis>,
        lasts: As<Millis>,
    },
    Leak {
        active: As<PageCount>,
        hourly: As<PageCount>,
    },
    /// Of a record that `plimsoll manage --record` has made; the file's place is seen from the scenario's.
    Trace {
        file: String,
        machine: String,
    },
}

/// Default: 60 s, 256M.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BootTable {
    lasts: Option<As<Millis>>,
    touches: Option<As<PageCount>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RestartTable {
    class: Spanned<String>,
    at: As<Millis>,
    /// Default: all at once.
    within: Option<As<Millis>>,
    /// Default: 10s.
    down: Option<As<Millis>>,
    /// Default: all of them.
    share: Option<Spanned<As<Ppm>>>,
}

/// The text, to find lines in.
struct Source<'a> {
    text: &'a str,
    path: &'a Path,
}

impl Source<'_> {
    fn file(&self) -> String {
        self.path.display().to_string()
    }

    fn line(&self, span: &Range<usize>) -> usize {
        let end = span.start.min(self.text.len());
        self.text.as_bytes()[..end].iter().filter(|byte| **byte == b'\n').count() + 1
    }

    fn wrong(&self, span: &Range<usize>, what: impl Into<String>) -> ScenarioError {
        ScenarioError::Written { file: self.file(), line: self.line(span), what: what.into() }
    }

    fn recorded(&self, span: &Range<usize>, source: TraceError) -> ScenarioError {
        ScenarioError::Trace { file: self.file(), line: self.line(span), source }
    }

    fn contradiction(&self, span: &Range<usize>, whose: String, source: SettingsError) -> ScenarioError {
        ScenarioError::Settings { file: self.file(), line: self.line(span), whose, source }
    }
}

pub(super) fn scenario(text: &str, path: &Path) -> Result<Scenario, ScenarioError> {
    let source = Source { text, path };
    let file: File = toml::from_str(text).map_err(|error| {
        // Of a message of several lines the first says what is wrong.
        let what = error.message().lines().next().unwrap_or_default().to_owned();
        source.wrong(&error.span().unwrap_or_default(), what)
    })?;
    let duration = file.duration.get_ref().0;
    if duration < Millis(1000) {
        return Err(source.wrong(&file.duration.span(), "a duration of less than a second: use at least 1s"));
    }
    let groups = groups(&file.group, &source)?;
    let classes = classes(&file.class, &groups, &source)?;
    let scenario = Scenario {
        title: file.title,
        seed: file.seed,
        duration,
        hosts: hosts(&file.hosts, &source)?,
        placement: Placement {
            order: file.placement.policy.unwrap_or(Order::Spread),
            overcommit: file.placement.overcommit.map(|times| times.0.0),
            within: file.placement.within.map_or(Millis(600_000), |within| within.0),
        },
        physics: physics(&file.costs, &source)?,
        estimator: estimator(&file.estimator, &source)?,
        tax: tax(file.idle_tax.as_ref(), &source)?,
        restarts: restarts(&file.restart, &classes, &source)?,
        groups,
        classes,
    };
    check_together(&scenario, &file.group, &source)?;
    Ok(scenario)
}

fn hosts(table: &HostsTable, source: &Source<'_>) -> Result<Hosts, ScenarioError> {
    let count = *table.count.get_ref();
    if count == 0 || count > HOSTS_MAX {
        return Err(source.wrong(&table.count.span(), format!("{count} hosts: use 1 to {HOSTS_MAX}")));
    }
    let measured = Overheads::MEASURED;
    let OverheadsTable { tables_per_page, page_tables_per_page, store_per_page, vmm } = &table.overheads;
    let capacity = Capacity {
        total: table.memory.get_ref().0,
        own: table.own.map_or(ByteCount::mib(1024), |own| own.0),
        overheads: Overheads {
            tables_per_page: tables_per_page.map_or(measured.tables_per_page, u64::from),
            page_tables_per_page: page_tables_per_page.map_or(measured.page_tables_per_page, u64::from),
            store_per_page: store_per_page.map_or(measured.store_per_page, u64::from),
            vmm: vmm.map_or(measured.vmm, |vmm| vmm.0),
        },
    };
    let Capacity { total, own, .. } = capacity;
    if total > PAGES_MAX.bytes() {
        let what = format!("a host of {total}: use at most {}", PAGES_MAX.bytes());
        return Err(source.wrong(&table.memory.span(), what));
    }
    let kept = min_free(total);
    if total.saturating_sub(kept) <= own {
        let what = format!("a host of {total} uses {own} itself and keeps {kept} free: give it more memory");
        return Err(source.wrong(&table.memory.span(), what));
    }
    Ok(Hosts { count: count as usize, capacity })
}

fn physics(table: &CostsTable, source: &Source<'_>) -> Result<Physics, ScenarioError> {
    let mut costs = table.file.as_ref().map_or(Ok(Costs::MEASURED), |named| costs_in(named, source))?;
    let tables = [&table.guest_free, &table.balloon, &table.sharing, &table.compress, &table.disk];
    for (cost, table) in costs.0.iter_mut().zip(tables) {
        let Some(table) = table else { continue };
        let keeps = table.keeps.as_ref().map_or(cost.keeps, |keeps| keeps.get_ref().0);
        if let Some(given) = table.keeps.as_ref().filter(|_| keeps >= Ppm::WHOLE) {
            let what =
                format!("{keeps} of a page stay: a way that frees nothing is none, use less than 100%");
            return Err(source.wrong(&given.span(), what));
        }
        *cost = Cost {
            take_ns: table.take.map_or(cost.take_ns, |nanos| nanos.0.0),
            back_ns: table.back.map_or(cost.back_ns, |nanos| nanos.0.0),
            keeps,
            ..*cost
        };
    }
    let takers = table.threads.as_ref().map_or(Physics::TAKERS_USUAL, |threads| *threads.get_ref());
    if let Some(given) = table.threads.as_ref().filter(|_| !(1..=1024).contains(&takers)) {
        return Err(source.wrong(&given.span(), format!("{takers} threads: use 1 to 1024")));
    }
    Ok(Physics {
        costs,
        mistakes: table.mistakes.map_or(Physics::MISTAKES_USUAL, |part| part.0.min(Ppm::WHOLE)),
        takers,
    })
}

fn costs_in(named: &Spanned<String>, source: &Source<'_>) -> Result<Costs, ScenarioError> {
    let path = source.path.parent().unwrap_or(Path::new("")).join(named.get_ref());
    let file = path.display().to_string();
    let text = std::fs::read_to_string(&path).map_err(|why| ScenarioError::Costs {
        file: source.file(),
        line: source.line(&named.span()),
        source: why,
    })?;
    let costs: CostsFile = serde_json::from_str(&text).map_err(|error| {
        let said = error.to_string();
        let what = said.rsplit_once(" at line ").map_or(&*said, |(what, _)| what).to_owned();
        ScenarioError::Written { file, line: error.line(), what }
    })?;
    Ok(Costs::from(&costs))
}

fn estimator(table: &EstimatorTable, source: &Source<'_>) -> Result<Estimator, ScenarioError> {
    let period = table.period.as_ref().map_or(Millis(60_000), |period| period.get_ref().0);
    let samples = table.samples.as_ref().map_or(100, |samples| *samples.get_ref());
    if let Some(given) = table.period.as_ref().filter(|_| !(Millis(1000)..=Millis(60_000)).contains(&period))
    {
        return Err(source.wrong(&given.span(), format!("a sampling period of {period}: use 1s to 60s")));
    }
    if let Some(given) = table.samples.as_ref().filter(|_| !(1..=100_000).contains(&samples)) {
        return Err(source.wrong(&given.span(), format!("{samples} samples a period: use 1 to 100000")));
    }
    Ok(Estimator { period, samples })
}

fn tax(given: Option<&Spanned<As<Ppm>>>, source: &Source<'_>) -> Result<IdleTax, ScenarioError> {
    let Some(given) = given else { return Ok(IdleTax::USUAL) };
    IdleTax::new(given.get_ref().0).map_err(|error| source.wrong(&given.span(), error.to_string()))
}

fn groups(tables: &[GroupTable], source: &Source<'_>) -> Result<Vec<(String, GroupSettings)>, ScenarioError> {
    let mut ids = BTreeMap::new();
    for (table, id) in tables.iter().zip(1..) {
        if ids.insert(table.name.get_ref(), GroupId(id)).is_some() {
            let what =
                format!("a second group is called {}: give each a name of its own", table.name.get_ref());
            return Err(source.wrong(&table.name.span(), what));
        }
    }
    let group = |(table, id): (&GroupTable, u32)| {
        let parent = table.parent.as_ref().map(|parent| {
            let unknown = || {
                source.wrong(
                    &parent.span(),
                    format!("there is no group {}: name one that there is", parent.get_ref()),
                )
            };
            ids.get(parent.get_ref()).copied().ok_or_else(unknown)
        });
        let settings = GroupSettings {
            parent: parent.transpose()?,
            reservation: table.reservation.map(|bytes| bytes.0),
            limit: table.limit.map(|bytes| bytes.0),
            shares: table.shares.map_or(Shares::NORMAL, Shares),
            domain: table.sharing.then_some(DomainId(id)),
            ..GroupSettings::new(GroupId(id))
        };
        Ok((table.name.get_ref().clone(), settings))
    };
    tables.iter().zip(1..).map(group).collect()
}

fn classes(
    tables: &[ClassTable],
    groups: &[(String, GroupSettings)],
    source: &Source<'_>,
) -> Result<Vec<Class>, ScenarioError> {
    let mut classes: Vec<Class> = Vec::with_capacity(tables.len());
    let mut machines = 0;
    for table in tables {
        machines += u64::from(*table.count.get_ref());
        if machines > MACHINES_MAX {
            return Err(
                source.wrong(&table.count.span(), format!("{machines} machines: use at most {MACHINES_MAX}"))
            );
        }
        let name = table.name.get_ref();
        if classes.iter().any(|class| class.name == *name) {
            let what = format!("a second class is called {name}: give each a name of its own");
            return Err(source.wrong(&table.name.span(), what));
        }
        classes.push(class(table, classes.len(), groups, source)?);
    }
    if classes.is_empty() || machines == 0 {
        return Err(source.wrong(&(0..0), "there is no machine: add a [[class]] with a count"));
    }
    Ok(classes)
}

fn class(
    table: &ClassTable,
    index: usize,
    groups: &[(String, GroupSettings)],
    source: &Source<'_>,
) -> Result<Class, ScenarioError> {
    let group = table.group.as_ref().map(|group| {
        let unknown = || {
            source.wrong(
                &group.span(),
                format!("there is no group {}: name one that there is", group.get_ref()),
            )
        };
        let found = groups.iter().find(|(name, _)| name == group.get_ref());
        found.map(|(_, settings)| settings.id).ok_or_else(unknown)
    });
    let skew = table.skew.as_ref().map_or(Class::SKEW_USUAL, |skew| skew.get_ref().0);
    if let Some(given) = table.skew.as_ref().filter(|_| skew > Ppm::percent(99)) {
        return Err(source.wrong(&given.span(), format!("a skew of {skew}: use 0% (all pages alike) to 99%")));
    }
    let processors =
        table.processors.as_ref().map_or(Class::PROCESSORS_USUAL, |processors| *processors.get_ref());
    if let Some(given) = table.processors.as_ref().filter(|_| !(1..=4096).contains(&processors)) {
        return Err(source.wrong(&given.span(), format!("{processors} processors: use 1 to 4096")));
    }
    let twins = table.twins.as_ref().map_or(Ppm::ZERO, |twins| twins.get_ref().0);
    if let Some(given) = table.twins.as_ref().filter(|_| twins > Ppm::WHOLE) {
        return Err(source.wrong(&given.span(), format!("{twins} of the pages have twins: use at most 100%")));
    }
    let usual = [As(Rung::GuestFree), As(Rung::Compress), As(Rung::Disk)];
    let rungs = table.rungs.as_deref().unwrap_or(&usual);
    let boot = table.boot.as_ref();
    let class = Class {
        index,
        name: table.name.get_ref().clone(),
        count: *table.count.get_ref(),
        group: group.transpose()?,
        face: face(&table.memory, source)?,
        highest: table.highest.map_or(Rung::Disk, |rung| rung.0),
        objective: table.stall_objective.map_or(STALL_OBJECTIVE_USUAL, |part| part.0),
        rungs: rungs.iter().fold(Rungs::NONE, |rungs, rung| rungs.with(rung.0)),
        curve: Curve::Constant { active: PageCount(0) },
        keeps: table.keeps.as_ref().map(|pages| pages.get_ref().0),
        touches: table.touches.unwrap_or(Class::TOUCHES_USUAL),
        locality: Locality::zipf(skew),
        grows: table.grows.map_or(Class::GROWS_USUAL.pages_floor(), |pages| pages.0),
        processors,
        twins,
        boot: Boot {
            lasts: boot.and_then(|boot| boot.lasts).map_or(Millis(60_000), |lasts| lasts.0),
            touches: boot
                .and_then(|boot| boot.touches)
                .map_or(ByteCount::mib(256).pages_floor(), |pages| pages.0),
        },
        begin: Begin::Booting,
        keeper: Keeper::Pager,
    };
    let whose = || format!("class {}", class.name);
    let terms = Terms::of(&class.settings(MachineId(1)))
        .map_err(|error| source.contradiction(&table.memory.span(), whose(), error))?;
    if u32::try_from(terms.size.0).is_err() {
        return Err(source.wrong(&table.memory.span(), "a machine of 16T or more: use less"));
    }
    let fits = |what: &str, pages: PageCount, span: Range<usize>| {
        let too_much =
            || format!("{what} of {}, more than the machine's size of {}", pages.bytes(), terms.size.bytes());
        if pages > terms.size { Err(source.wrong(&span, too_much())) } else { Ok(()) }
    };
    if let Some(keeps) = &table.keeps {
        fits("contents", keeps.get_ref().0, keeps.span())?;
    }
    let curve = curve(&table.demand, terms.size, source)?;
    if let Some(most) = most_active(&curve) {
        fits("a demand", most, table.demand.span())?;
    }
    Ok(Class { curve, ..class })
}

/// The most a curve asks for, where that is known beforehand.
const fn most_active(curve: &Curve) -> Option<PageCount> {
    match curve {
        Curve::Constant { active } | Curve::Leak { active, .. } => Some(*active),
        Curve::Daily { high, .. } | Curve::Bursts { high, .. } => Some(*high),
        Curve::Trace(_) => None,
    }
}

fn face(given: &Spanned<MemoryTable>, source: &Source<'_>) -> Result<Face, ScenarioError> {
    let MemoryTable {
        size,
        reservation,
        limit,
        shares,
        startup,
        minimum,
        maximum,
        buffer,
        weight,
        r#static,
        dedicated,
    } = given.get_ref();
    let esx = size.is_some() || reservation.is_some() || limit.is_some() || shares.is_some();
    let hyper_v =
        startup.is_some() || minimum.is_some() || maximum.is_some() || buffer.is_some() || weight.is_some();
    let faces = [esx, hyper_v, r#static.is_some(), dedicated.is_some()];
    if faces.into_iter().filter(|is_given| *is_given).count() != 1 {
        let what = "memory is said in one way: { size, reservation, limit, shares }, \
                    { startup, minimum, maximum, buffer, weight }, { static } or { dedicated }";
        return Err(source.wrong(&given.span(), what));
    }
    let needs = |value: Option<As<ByteCount>>, name: &str| {
        value
            .map(|bytes| bytes.0)
            .ok_or_else(|| source.wrong(&given.span(), format!("memory without {name}: add it")))
    };
    if let Some(size) = r#static {
        return Ok(Face::Static { size: size.0 });
    }
    if let Some(size) = dedicated {
        return Ok(Face::Dedicated { size: size.0 });
    }
    if esx {
        let size = needs(*size, "a size")?;
        return Ok(Face::Guarantee {
            size,
            reservation: reservation.map_or(ByteCount(0), |bytes| bytes.0),
            limit: limit.map_or(size, |bytes| bytes.0),
            shares: shares.map_or(Shares::NORMAL, Shares),
        });
    }
    Ok(Face::Dynamic {
        startup: needs(*startup, "startup")?,
        minimum: needs(*minimum, "a minimum")?,
        maximum: needs(*maximum, "a maximum")?,
        buffer: buffer.map_or(BUFFER_USUAL, |part| part.0),
        weight: weight.unwrap_or(Shares::NORMAL.0),
    })
}

fn curve(given: &Spanned<DemandTable>, size: PageCount, source: &Source<'_>) -> Result<Curve, ScenarioError> {
    let crossed = |low: PageCount, high: PageCount| {
        let what = format!("a low of {} above a high of {}: exchange them", low.bytes(), high.bytes());
        if low > high { Err(source.wrong(&given.span(), what)) } else { Ok(()) }
    };
    Ok(match given.get_ref() {
        DemandTable::Idle {} => Curve::Constant { active: PageCount(size.0 / IDLE_PART) },
        DemandTable::Constant { active } => Curve::Constant { active: active.0 },
        DemandTable::Daily { low, high, peak, jitter } => {
            crossed(low.0, high.0)?;
            let jitter = jitter.map_or(Millis(0), |jitter| jitter.0);
            if jitter.0 >= crate::time::DAY.0 / 2 {
                return Err(source.wrong(&given.span(), format!("a jitter of {jitter}: use less than 12h")));
            }
            Curve::Daily { low: low.0, high: high.0, peak: Millis(peak.0.0 % crate::time::DAY.0), jitter }
        }
        DemandTable::Bursts { low, high, every, lasts } => {
            crossed(low.0, high.0)?;
            if lasts.0 > every.0 || every.0 < Millis(1000) {
                let what = format!(
                    "bursts of {} every {}: use a second or more, and shorter bursts",
                    lasts.0, every.0
                );
                return Err(source.wrong(&given.span(), what));
            }
            Curve::Bursts { low: low.0, high: high.0, every: every.0, lasts: lasts.0 }
        }
        DemandTable::Leak { active, hourly } => Curve::Leak { active: active.0, hourly: hourly.0 },
        DemandTable::Trace { file, machine } => {
            let path = source.path.parent().unwrap_or(Path::new("")).join(file);
            let track = Record::read(&path).and_then(|record| record.track(machine));
            Curve::Trace(Arc::new(track.map_err(|error| source.recorded(&given.span(), error))?))
        }
    })
}

/// An idle machine is active in this part of its memory: 5 of 512 MiB in README's example of an idle Debian.
const IDLE_PART: u64 = 100;

fn restarts(
    tables: &[RestartTable],
    classes: &[Class],
    source: &Source<'_>,
) -> Result<Vec<Restart>, ScenarioError> {
    let restart = |table: &RestartTable| {
        let name = table.class.get_ref();
        let unknown =
            || source.wrong(&table.class.span(), format!("there is no class {name}: name one that there is"));
        let class = classes.iter().find(|class| class.name == *name).ok_or_else(unknown)?;
        let share = table.share.as_ref().map_or(Ppm::WHOLE, |share| share.get_ref().0);
        if let Some(given) = table.share.as_ref().filter(|_| share > Ppm::WHOLE) {
            return Err(source.wrong(&given.span(), format!("{share} of the machines: use at most 100%")));
        }
        Ok(Restart {
            class: class.index,
            at: table.at.0,
            within: table.within.map_or(Millis(0), |within| within.0),
            down: table.down.map_or(Millis(10_000), |down| down.0),
            share,
        })
    };
    tables.iter().map(restart).collect()
}

/// What groups contradict, alone and with one another.
fn check_together(
    scenario: &Scenario,
    groups: &[GroupTable],
    source: &Source<'_>,
) -> Result<(), ScenarioError> {
    let Err(error) = Tree::new(scenario.empty_host()) else { return Ok(()) };
    let id = match error.owner() {
        Owner::Group(group) => Some(group),
        Owner::Machine(_) | Owner::Host => None,
    };
    let place = id.and_then(|id| usize::try_from(id.0).ok()?.checked_sub(1));
    let table = place.and_then(|place| groups.get(place));
    let span = table.map_or(0..0, |table| table.name.span());
    let whose =
        table.map_or_else(|| "the host".to_owned(), |table| format!("group {}", table.name.get_ref()));
    Err(source.contradiction(&span, whose, error))
}
