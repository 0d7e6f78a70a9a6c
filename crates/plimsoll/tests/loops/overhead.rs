//! What machines cost besides their guests' pages: as predicted, against what /proc measures.
use super::fleet::{Fleet, MIB, guest};
use super::run::{alone, can};
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_host::backend::Overhead;
use plimsoll_policy::settings::{Face, Shares};
use plimsoll_types::ByteCount;
use std::time::Duration;

#[test]
fn the_predicted_overhead_of_1_4_and_16_machines_is_what_proc_measures() {
    let _alone = alone();
    if !["root", "kvm", "userfaultfd", "cgroup"].into_iter().all(can) {
        return;
    }
    let mut found: Vec<(u32, u64, u64)> = Vec::new();
    for count in [1, 4, 16] {
        let size = MIB(96);
        let mut fleet = Fleet::new(MIB(4096));
        for number in 0..count {
            let spec = WorkloadSpec { ops_per_second: 10, ..WorkloadSpec::new(WorkloadKind::Idle) };
            let face =
                Face::Guarantee { size, reservation: ByteCount(0), limit: size, shares: Shares::NORMAL };
            fleet.start(&guest(&format!("g{number}"), 96, spec), face);
        }
        fleet.populate();
        // Overheads are measured every 10 s.
        fleet.turns(Duration::from_secs(11));
        let (mut predicted, mut measured) = (ByteCount(0), Overhead::default());
        for (id, costs, last) in fleet.control.overheads() {
            predicted += costs.of(fleet.control.tree().terms(id).unwrap());
            measured = measured + last.unwrap();
        }
        println!("{count} machines: predicted {predicted}, measured {} {measured:?}", measured.total());
        found.push((count, predicted.0, measured.total().0));
        fleet.finish();
    }
    for (count, one, other) in found {
        assert!(one.abs_diff(other) * 10 <= other, "{count}: predicted {one}, measured {other} bytes");
    }
}
