//! Settings: checked and described.
use super::run::Run;
use std::fs;

#[test]
fn checking_settings_tells_every_mistake_on_a_line_of_its_own_and_the_description_has_every_table() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("host.toml");
    let shown = file.to_str().unwrap();
    fs::write(&file, "[machine.a]\nlimit = 5\n[machine.b]\nshares = 0\n").unwrap();
    let ended = Run::new(&["config", "check", shown]).output();
    ended.expect_code(2);
    let told: Vec<&str> = ended.stderr.strip_prefix("plimsoll config: ").unwrap().lines().collect();
    assert!(told[0].starts_with(&format!("{shown}:2: limit = 5: write a size")), "{told:?}");
    assert_eq!(told[1..], [format!("{shown}:4: b has 0 shares: give it at least 1")]);
    fs::write(&file, "[machine.a]\n[[rule]]\nname = \"*\"\n").unwrap();
    let ended = Run::new(&["config", "check", shown]).output();
    ended.expect_code(0);
    assert_eq!(ended.stdout, format!("{shown}: 1 machines, 0 groups, 1 rules; no mistakes\n"));
    let ended = Run::new(&["config", "docs"]).output();
    ended.expect_code(0);
    for heading in ["## `[host]`", "## `[group.", "## `[machine.", "## `[[rule]]`", "| `stall-objective` |"] {
        assert!(ended.stdout.contains(heading), "{heading}");
    }
}
