//! What is known of a daemon, in the order in which it is shown.
//!
//! Enters: snapshots, choices. Leaves: rows. What must never happen: a rate over two managers, whose counts begin anew.
use super::feed::{Detail, Snapshot};
use plimsoll_host::api::{Host, Machine, Memory};
use serde::Serialize;
use std::collections::BTreeMap;

/// How many snapshots long it is said that a daemon is back.
const BACK: u8 = 5;

/// What machines are ordered by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Sort {
    /// Their names.
    Name,
    /// What their guests own.
    Size,
    /// What they take up.
    Used,
    /// What they are to come to.
    Target,
    /// Faults a second.
    Faults,
    /// How much of the time they wait for memory.
    Waits,
}

impl Sort {
    pub(super) const ALL: [Self; 6] =
        [Self::Name, Self::Size, Self::Used, Self::Target, Self::Faults, Self::Waits];

    /// The key that chooses it: its first letter.
    pub(super) const fn key(self) -> char {
        match self {
            Self::Name => 'n',
            Self::Size => 's',
            Self::Used => 'u',
            Self::Target => 't',
            Self::Faults => 'f',
            Self::Waits => 'w',
        }
    }
}

/// A machine, and how often it faults.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    #[serde(flatten)]
    pub(super) machine: Machine,
    /// Nothing before the second decision that was seen.
    pub(super) faults_per_second: Option<u64>,
}

impl Row {
    fn memory(&self, of: fn(&Memory) -> u64) -> u64 {
        self.machine.memory.as_ref().map_or(0, of)
    }

    fn weight(&self, sort: Sort) -> u64 {
        match sort {
            Sort::Name => 0,
            Sort::Size => self.machine.size_bytes,
            Sort::Used => self.memory(|memory| memory.consumed_bytes),
            Sort::Target => self.memory(|memory| memory.target_bytes),
            Sort::Faults => self.faults_per_second.unwrap_or(0),
            Sort::Waits => self.memory(|memory| u64::from(memory.stalled_ppm)),
        }
    }
}

/// How it is with the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Link {
    /// Nobody has answered yet.
    New,
    /// It answers.
    Up,
    /// It does again, since so many snapshots.
    Back(u8),
    /// It does not, and why. What is shown is old.
    Away(String),
}

/// What is shown.
pub(super) struct State {
    host: Option<Host>,
    rows: Vec<Row>,
    detail: Option<Detail>,
    pub(super) link: Link,
    pub(super) sort: Sort,
    is_reversed: bool,
    /// The machine that is chosen, by its number.
    chosen: Option<u32>,
    /// The name that the feed was told last.
    asked: Option<String>,
    /// Whether more of the chosen machine is shown.
    pub(super) is_open: bool,
}

impl State {
    pub(super) fn new(sort: Sort) -> Self {
        let (host, detail, chosen, asked) = (None, None, None, None);
        let (rows, link) = (Vec::new(), Link::New);
        Self { host, rows, detail, link, sort, is_reversed: false, chosen, asked, is_open: true }
    }

    pub(super) const fn host(&self) -> Option<&Host> {
        self.host.as_ref()
    }

    pub(super) fn rows(&self) -> &[Row] {
        &self.rows
    }

    pub(super) fn into_rows(self) -> Vec<Row> {
        self.rows
    }

    /// More about the machine that is chosen, once that is known.
    pub(super) fn detail(&self) -> Option<(&Row, Option<&Detail>)> {
        let row = self.rows.get(self.at()?)?;
        Some((row, self.detail.as_ref().filter(|detail| detail.name == row.machine.name)))
    }

    /// Where the chosen machine is; the first one where that has gone.
    pub(super) fn at(&self) -> Option<usize> {
        let at = self.rows.iter().position(|row| Some(row.machine.id) == self.chosen);
        at.or_else(|| (!self.rows.is_empty()).then_some(0))
    }

    pub(super) fn heard(&mut self, heard: Result<Snapshot, String>) {
        let Snapshot { host, machines, detail } = match heard {
            Ok(snapshot) => snapshot,
            Err(why) => {
                self.link = Link::Away(why);
                return;
            }
        };
        self.link = match self.link {
            Link::Away(_) if self.host.is_some() => Link::Back(BACK),
            Link::Back(left) if left > 1 => Link::Back(left - 1),
            _ => Link::Up,
        };
        let before = self.host.as_ref().filter(|before| before.pid == host.pid);
        let since_ms = before.map(|before| host.decided_unix_ms.saturating_sub(before.decided_unix_ms));
        let known: BTreeMap<u32, &Row> = self.rows.iter().map(|row| (row.machine.id, row)).collect();
        let row = |machine: Machine| {
            let before = known.get(&machine.id).filter(|row| row.machine.name == machine.name);
            let faults = |machine: &Machine| machine.pages.map(|pages| pages.faults);
            let faults_per_second = match (since_ms, before) {
                // The same decision as before.
                (Some(0), Some(before)) => before.faults_per_second,
                (Some(ms), Some(before)) => faults(&machine)
                    .zip(faults(&before.machine))
                    .map(|(now, then)| now.saturating_sub(then) * 1000 / ms),
                _ => None,
            };
            Row { machine, faults_per_second }
        };
        let rows = machines.into_iter().map(row).collect();
        (self.rows, self.host, self.detail) = (rows, Some(host), detail);
        self.order();
    }

    fn order(&mut self) {
        let (sort, is_reversed) = (self.sort, self.is_reversed);
        self.rows.sort_by(|one, other| {
            let by_weight = other.weight(sort).cmp(&one.weight(sort));
            let by_weight = if is_reversed { by_weight.reverse() } else { by_weight };
            let by_name = one.machine.name.cmp(&other.machine.name);
            let by_name = if is_reversed && sort == Sort::Name { by_name.reverse() } else { by_name };
            by_weight.then(by_name).then(one.machine.id.cmp(&other.machine.id))
        });
    }

    pub(super) fn sort_by(&mut self, sort: Sort) {
        (self.sort, self.is_reversed) = (sort, false);
        self.order();
    }

    pub(super) fn reverse(&mut self) {
        self.is_reversed = !self.is_reversed;
        self.order();
    }

    /// Chooses another row by where the chosen one is.
    pub(super) fn choose(&mut self, to: impl FnOnce(usize) -> usize) {
        let Some(at) = self.at() else { return };
        self.chosen = self.rows.get(to(at).min(self.rows.len() - 1)).map(|row| row.machine.id);
    }

    /// The name to ask more about, if it is another than before.
    pub(super) fn new_choice(&mut self) -> Option<Option<String>> {
        let name = self.at().and_then(|at| self.rows.get(at)).filter(|_| self.is_open);
        let name = name.map(|row| row.machine.name.clone());
        if name == self.asked {
            return None;
        }
        self.asked.clone_from(&name);
        Some(name)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use plimsoll_host::api::Machines;
    use serde_json::json;

    const MIB: u64 = 1 << 20;

    /// A daemon with these machines, of 1 GiB each: name, what it takes up in MiB, faults.
    pub(in crate::top) fn snapshot(pid: u32, decided_ms: u64, machines: &[(&str, u64, u64)]) -> Snapshot {
        let host = json!({"version": "0.1.0", "pid": pid, "decided_unix_ms": decided_ms, "state": "high",
            "budget_bytes": 4096 * MIB, "free_bytes": 1024 * MIB, "kept_free_bytes": 245 * MIB,
            "shared_bytes": 3800 * MIB, "reserved_bytes": 0, "machines": machines.len(), "waiting": []});
        let machine = |(id, (name, used, faults)): (usize, &(&str, u64, u64))| {
            let memory = json!({"consumed_bytes": used * MIB, "stored_bytes": 64 * MIB, "active_bytes": 200 * MIB,
                "entitlement_bytes": 512 * MIB, "target_bytes": 600 * MIB, "balloon_bytes": null, "stalled_ppm": 4000});
            let pages = json!({"resident_bytes": 512 * MIB, "limbo_bytes": 128 * MIB, "stored_bytes": 192 * MIB,
                "disk_bytes": 64 * MIB, "free_bytes": 128 * MIB, "faults": faults});
            json!({"id": id, "name": name, "kind": "handed_over", "pid": 4242, "state": "running", "trouble": null,
                "size_bytes": 1024 * MIB, "memory": memory, "pages": pages,
                "reason": "its target goes from 700M to 600M: others use more", "settings": {}})
        };
        let machines: Vec<_> = machines.iter().enumerate().map(machine).collect();
        let total = machines.len();
        let page: Machines =
            serde_json::from_value(json!({"machines": machines, "next": null, "total": total})).unwrap();
        Snapshot { host: serde_json::from_value(host).unwrap(), machines: page.machines, detail: None }
    }

    fn names(state: &State) -> Vec<&str> {
        state.rows().iter().map(|row| &*row.machine.name).collect()
    }

    #[test]
    fn faults_a_second_are_counted_over_two_decisions_of_one_manager_only() {
        let mut state = State::new(Sort::Used);
        let mut rate = |pid, ms, faults| {
            state.heard(Ok(snapshot(pid, ms, &[("web", 1, faults)])));
            state.rows()[0].faults_per_second
        };
        assert_eq!(rate(1, 1000, 500), None);
        assert_eq!(rate(1, 3000, 1500), Some(500));
        assert_eq!(rate(1, 3000, 1500), Some(500), "nothing was decided since");
        assert_eq!(rate(2, 4000, 7), None, "another manager counts anew");
        assert_eq!(rate(2, 5000, 8), Some(1));
    }

    #[test]
    fn the_chosen_machine_stays_chosen_however_machines_are_ordered() {
        let mut state = State::new(Sort::Used);
        assert_eq!(state.new_choice(), None);
        state.heard(Ok(snapshot(1, 0, &[("b", 10, 0), ("a", 30, 0), ("c", 20, 0)])));
        assert_eq!(names(&state), ["a", "c", "b"]);
        assert_eq!(state.new_choice(), Some(Some("a".to_owned())));
        state.choose(|at| at + 1);
        assert_eq!(state.new_choice(), Some(Some("c".to_owned())));
        state.sort_by(Sort::Name);
        assert_eq!((names(&state), state.at()), (vec!["a", "b", "c"], Some(2)));
        state.reverse();
        assert_eq!((names(&state), state.at()), (vec!["c", "b", "a"], Some(0)));
        assert_eq!(state.new_choice(), None);
        state.choose(|_| usize::MAX);
        assert_eq!(state.new_choice(), Some(Some("a".to_owned())));
        state.is_open = false;
        assert_eq!(state.new_choice(), Some(None));
    }

    #[test]
    fn a_daemon_that_goes_leaves_what_was_known_and_is_said_to_be_back() {
        let mut state = State::new(Sort::Used);
        state.heard(Err("nobody".to_owned()));
        state.heard(Ok(snapshot(1, 0, &[("web", 1, 0)])));
        assert_eq!(state.link, Link::Up, "it was never gone");
        state.heard(Err("gone".to_owned()));
        assert_eq!((&state.link, state.rows().len()), (&Link::Away("gone".to_owned()), 1));
        for left in (1..=BACK).rev() {
            state.heard(Ok(snapshot(2, 0, &[])));
            assert_eq!(state.link, Link::Back(left));
        }
        state.heard(Ok(snapshot(2, 0, &[])));
        assert_eq!(state.link, Link::Up);
    }
}
