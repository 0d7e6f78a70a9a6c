//! Settings files that are understood, and the sentence for each that is not.
use super::*;
use plimsoll_policy::costs::Losses;
use plimsoll_policy::settings::BUFFER_USUAL;
use plimsoll_types::DomainId;

fn refusal(text: &str) -> String {
    Config::parse(text, "host.toml").expect_err(text).to_string()
}

const MIB: fn(u64) -> ByteCount = ByteCount::mib;

#[test]
fn both_faces_and_groups_are_understood() {
    let text = r#"
        [host]
        memory = "4G"
        reserve = "256M"
        idle-tax = "50 %"
        [group.tenant]
        reservation = "1G"
        sharing = true
        [group.inner]
        group = "tenant"
        limit = "2G"
        [machine.web]
        group = "inner"
        reservation = "512M"
        shares = 10000
        highest = "never-page"
        stall-objective = "0.25%"
        qmp = "/run/web.qmp"
        [machine.db]
        minimum = "256M"
        maximum = "4G"
        startup = "1G"
        [machine.rt]
        kind = "dedicated"
    "#;
    let config = Config::parse(text, "host.toml").unwrap();
    assert_eq!((config.memory, config.reserve), (Some(MIB(4096)), MIB(256)));
    assert_eq!(config.tax.rate(), Ppm::percent(50));
    let (tenant, inner) = (config.groups["tenant"], config.groups["inner"]);
    assert_eq!(tenant.domain, Some(DomainId(tenant.id.0)));
    assert_eq!((inner.parent, inner.domain, inner.limit), (Some(tenant.id), None, Some(MIB(2048))));
    let web = config.machine("web").settings(MachineId(7), MIB(1024));
    assert_eq!((web.id, web.parent, web.highest), (MachineId(7), Some(inner.id), Rung::Sharing));
    assert_eq!(web.stall_objective, Ppm(2_500));
    let shares = Shares(10_000);
    let (size, reservation, limit) = (MIB(1024), MIB(512), MIB(1024));
    assert_eq!(web.face, Face::Guarantee { size, reservation, limit, shares });
    let (startup, minimum, maximum) = (MIB(1024), MIB(256), MIB(4096));
    let db = config.machine("db").settings(MachineId(8), MIB(9));
    assert_eq!(db.face, Face::Dynamic { startup, minimum, maximum, buffer: BUFFER_USUAL, weight: 5000 });
    let rt = config.machine("rt").settings(MachineId(9), MIB(64));
    assert_eq!(rt.face, Face::Dedicated { size: MIB(64) });
    let unknown = config.machine("nobody").settings(MachineId(9), MIB(64));
    assert_eq!(Terms::of(&unknown).unwrap().floor.0, 0);
}

#[test]
fn each_mistake_is_told_with_its_line_and_what_to_do() {
    let expected = [
        (
            "[machine.web]\nminimum = \"2G\"\nmaximum = \"1G\"\n",
            "host.toml:2: web has a minimum of 2G, more than its maximum of 1G: exchange them",
        ),
        (
            "[host]\nmemory = \"1G\"\nreserve = \"256M\"\n[machine.a]\nreservation = \"512M\"\n[machine.b]\nreservation = \"512M\"\n",
            "host.toml:2: the host has 768M for machines, but 1G is reserved: lower a reservation",
        ),
        ("[group.t]\nshares = 0\n", "host.toml:2: t has 0 shares: give it at least 1"),
        ("\n[machine.web]\nshares = 0\n", "host.toml:3: web has 0 shares: give it at least 1"),
        (
            "[machine.web]\nreservaton = \"1G\"\n",
            "host.toml:2: unknown key `reservaton`: use one of `group`, `kind`, `size`, `reservation`, `limit`, `shares`, \
          `startup`, `minimum`, `maximum`, `buffer`, `weight`, `highest`, `stall-objective`, `qmp`, `api`",
        ),
        (
            "[machine.web]\nlimit = \"1Q\"\n",
            "host.toml:2: \"1Q\": unknown size suffix: use K, M, G or T (powers of 1024)",
        ),
        (
            "[machine.web]\nlimit = 512\n",
            "host.toml:2: invalid type: integer `512`, expected a text with a unit, such as \"512M\" or \"20%\"",
        ),
        (
            "[machine.web]\nstall-objective = nan\n",
            "host.toml:2: invalid type: floating point `NaN`, expected a text with a unit, such as \"512M\" or \"20%\"",
        ),
        (
            "[machine.web]\nstall-objective = \"-1%\"\n",
            "host.toml:2: \"-1%\": not a percentage: write it as \"20%\" or \"0.1%\"",
        ),
        (
            "[group.a]\ngroup = \"b\"\n\n[group.b]\ngroup = \"a\"\n",
            "host.toml:2: a is nested in b, which is nested in a: leave out one of the two",
        ),
        (
            "[group.a]\n[machine.web]\ngroup = \"x\"\n",
            "host.toml:3: web belongs to the group \"x\", which is not there: add [group.x], or use one of a",
        ),
        (
            "[machine.web]\nminimum = \"1G\"\nmaximum = \"2G\"\nshares = 5\n",
            "host.toml:4: web has minimum, and shares of another face: use reservation, limit and shares, or startup, \
          minimum, maximum, buffer and weight",
        ),
        (
            "[machine.web]\nweight = 100\nminimum = \"1G\"\n",
            "host.toml:3: web has minimum and no maximum: add it",
        ),
        (
            "[machine.web]\nreservation = \"2G\"\nlimit = \"1G\"\n",
            "host.toml:2: web reserves 2G, more than its limit of 1G: lower one or raise the other",
        ),
        (
            "[group.t]\nreservation = \"1G\"\n[machine.web]\ngroup = \"t\"\nreservation = \"2G\"\n",
            "host.toml:2: t reserves 1G, but what is nested in it reserves 2G: raise the one or lower the other",
        ),
        (
            "[host]\nmemory = \"1G\"\nreserve = \"1G\"\n",
            "host.toml:2: the host has 1G, of which 1G are reserved: leave something for machines",
        ),
        (
            "[machine.web]\nlimit = \"1000001\"\n",
            "host.toml:2: web has a limit of 1000001 bytes: use a multiple of 4096",
        ),
        ("[machine.web\n", "host.toml:1: unclosed table, expected `]`"),
    ];
    for (text, sentence) in expected {
        assert_eq!(refusal(text), sentence, "{text}");
    }
    let tax = refusal("[host]\nidle-tax = \"100%\"\n");
    assert!(tax.starts_with("host.toml:2: ") && tax.contains("99 %"), "{tax}");
}

#[test]
fn costs_are_read_from_the_file_beside_the_settings_and_a_wrong_one_is_told_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let (settings, costs) = (folder.path().join("host.toml"), folder.path().join("costs.json"));
    std::fs::write(&settings, "[host]\nmemory = \"4G\"\ncosts = \"costs.json\"\n").unwrap();
    let missing = Config::read(&settings).unwrap_err().to_string();
    let expected = format!("{}:3: the costs {costs:?} cannot be read (", settings.display());
    assert!(missing.starts_with(&expected) && missing.contains("cargo xtask bench cost"), "{missing}");

    let compress = "\"compress\": {\"take_ns\": 9000, \"idle_ppm\": [1, 2, 3, 4, 5, 6]}";
    std::fs::write(&costs, format!("{{\"source\": \"mine\", {compress}}}")).unwrap();
    let read = Config::read(&settings).unwrap().settings(MIB(4096)).costs;
    let usual = Costs::MEASURED;
    let (cost, before) = (read.of(Rung::Compress), usual.of(Rung::Compress));
    assert_eq!((cost.take_ns, cost.back_ns, cost.busy), (9000, before.back_ns, before.busy));
    assert_eq!(cost.idle, Some(Losses([1, 2, 3, 4, 5, 6].map(Ppm))));
    assert_eq!(read.of(Rung::Balloon), usual.of(Rung::Balloon));

    let refused = |text: &str| {
        std::fs::write(&costs, text).unwrap();
        let error = Config::read(&settings).unwrap_err().to_string();
        error.strip_prefix(&format!("{}:", costs.display())).unwrap_or(&error).to_owned()
    };
    for (text, sentence) in [
        (
            "{\"source\": \"mine\",\n\"zswap\": {}}",
            "2: unknown key `zswap`: use one of `source`, `guest-free`, `balloon`, `sharing`, `compress`, `disk`",
        ),
        (
            "{\"source\": \"mine\",\n\n\"balloon\": {\"busy_ppm\": [0, 0]}}",
            "3: 2 losses: give 6, for 10, 20, 30, 40, 50 and 60 % taken",
        ),
        ("{\"source\": \"mine\"", "1: EOF while parsing an object"),
    ] {
        assert_eq!(refused(text), sentence);
    }
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Config::read("/no/such/host.toml".as_ref()).unwrap_err();
    assert_eq!(error.to_string(), "the settings \"/no/such/host.toml\" cannot be read");
}
