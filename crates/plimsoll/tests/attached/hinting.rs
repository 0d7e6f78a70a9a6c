//! A machine that is managed moves, and its guest tells QEMU meanwhile what it has free (free page hinting).
use crate::cooperation::described;
use crate::manager::{Manager, PATIENCE, STOCK, alone, ask, backed, bytes, can, swap, sweep};
use plimsoll_stock::{Command, Guest, Options};
use plimsoll_types::{ByteCount, PAGE_SIZE};
use serde_json::json;

/// What the guest has had, freed, and finds in swap when it moves.
const FREED: ByteCount = ByteCount::mib(160);
/// What it still has.
const KEPT: ByteCount = ByteCount::mib(24);
/// What must not have been read for the migration where the guest hinted it: one hint is 4 MiB, and how many QEMU hears of before it
/// has read and sent what they name is a race (19 to 101 MiB were left, 7 runs). Less than this may be in swap otherwise: what was
/// taken before the manager saw the migration.
const SPARED: ByteCount = ByteCount::mib(4);

/// How a guest hints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hinting {
    Off,
    /// What is free is allocated for that, and not touched.
    Untouched,
    /// The same under a kernel that zeroes what it allocates, as Debian's does by default.
    Zeroed,
}

/// What became of a migration.
struct Moved {
    /// Pages QEMU sent with their content.
    sent: u64,
    /// Left in swap at the source, not read.
    in_swap: ByteCount,
    /// Guest RAM in place at the target.
    arrived: ByteCount,
}

/// Has a manager take what the guest has freed, and moves the guest under it.
fn move_under_a_manager(hinting: Hinting) -> Moved {
    let mut options = Options::new(ByteCount::mib(256));
    options.seed = 81;
    let is_on = if hinting == Hinting::Off { "off" } else { "on" };
    options.devices = vec![format!("virtio-balloon-pci,id=balloon0,free-page-hint={is_on},iothread=hints")];
    options.arguments = ["-object", "iothread,id=hints"].map(str::to_owned).to_vec();
    let zeroes = u8::from(hinting == Hinting::Zeroed);
    options.parameters = vec![format!("init_on_alloc={zeroes}")];
    let mut source = Guest::start(options.clone()).unwrap();
    let told = &described(&source, &[])["free_page_hinting"];
    assert_eq!(told["why_not"].is_null(), hinting != Hinting::Off, "{told}");

    ask(&mut source, Command::Alloc { pages: FREED.pages_floor().0 });
    ask(&mut source, Command::Free);
    ask(&mut source, Command::Alloc { pages: KEPT.pages_floor().0 });
    let (pid, qmp) = (source.process().get().to_string(), source.qmp());
    let mut manager = Manager::attach(&[&pid, "--budget", "40M", "--qmp", qmp.to_str().unwrap()]);
    manager.until("what was freed to be taken", |line| {
        line["event"] == "period" && bytes(line, "taken_pages") * PAGE_SIZE as u64 > FREED.0
    });
    let mut target = Guest::await_migration(options).unwrap();
    source.migrate_to(&target).unwrap();
    assert!(source.has_migrated(PATIENCE).unwrap());
    manager.until("the end", |line| line["event"] == "ended" && line["how"] == "migrated");
    assert!(manager.end().0.success());
    let (_, in_swap) = backed(&source);
    let (arrived, _) = backed(&target);
    let sent = source.monitor().unwrap().call("query-migrate", &json!({})).unwrap();
    let sent = bytes(&sent["ram"], "normal");
    drop(source);
    ask(&mut target, Command::Ping);
    sweep(&mut target);
    println!("{hinting:?}: {sent} pages sent, {in_swap} still in swap, {arrived} arrived");
    Moved { sent, in_swap, arrived }
}

/// A kernel that zeroes what it allocates has everything back before it can hint it, as for a balloon: nothing is spared, and
/// nothing is wrong.
#[test]
fn what_a_guest_hints_as_free_while_it_moves_is_not_brought_back_unless_its_kernel_zeroes_it() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let _swap = swap(ByteCount::mib(1024));
    let [off, untouched, zeroed] =
        [Hinting::Off, Hinting::Untouched, Hinting::Zeroed].map(move_under_a_manager);
    // QEMU read and sent everything.
    assert!(off.in_swap < SPARED, "{}", off.in_swap);
    assert!(untouched.in_swap >= SPARED, "{}", untouched.in_swap);
    assert!(untouched.arrived + SPARED <= off.arrived, "{} of {}", untouched.arrived, off.arrived);
    assert!(untouched.sent + SPARED.pages_floor().0 <= off.sent, "{} of {}", untouched.sent, off.sent);
    assert!(zeroed.in_swap < SPARED, "{}", zeroed.in_swap);
}
