//! What QEMU's boards of other architectures say of their memory, in the device trees that they give to firmware.
use crate::common::is_here;
use plimsoll_core::frames::devicetree::claims;
use plimsoll_core::frames::firmware::{HostMap, Use};
use plimsoll_types::ByteCount;
use std::process::Command;

const GIB: u64 = 1 << 30;
/// Memory of 3 GiB, in one piece and as two nodes have it.
const WHOLE: [&str; 2] = ["-m", "3G"];
const NODES: [&str; 10] = [
    "-m",
    "3G",
    "-object",
    "memory-backend-ram,id=one,size=1G",
    "-object",
    "memory-backend-ram,id=other,size=2G",
    "-numa",
    "node,memdev=one",
    "-numa",
    "node,memdev=other",
];

#[test]
fn boards_of_other_architectures_have_the_memory_they_were_given() {
    let folder = tempfile::tempdir().unwrap();
    for (program, start) in [("qemu-system-aarch64", GIB), ("qemu-system-riscv64", 2 * GIB)] {
        if !is_here(program, "models") {
            return;
        }
        for (memory, pieces) in [(&WHOLE[..], 1), (&NODES, 2)] {
            let file = folder.path().join(format!("{program}-{pieces}"));
            let mut board = Command::new(program);
            board.args(["-nodefaults", "-display", "none", "-smp", "2", "-machine"]);
            let output = board.arg(format!("virt,dumpdtb={}", file.display())).args(memory).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let mut found = Vec::new();
            claims(&std::fs::read(&file).unwrap(), |claim| found.push(claim)).unwrap();
            let usable = found.iter().filter(|claim| claim.what == Use::Usable);
            assert_eq!(usable.count(), pieces, "{program}: {found:?}");
            let map: HostMap<16> = HostMap::new(&found).unwrap();
            let [region] = map.usable().collect::<Vec<_>>()[..] else { panic!("{program}: {map:?}") };
            let first = region.first.0 * plimsoll_types::PAGE_SIZE as u64;
            assert_eq!((first, region.pages.bytes()), (start, ByteCount(3 * GIB)), "{program}");
        }
    }
}
