//! Clients from elsewhere: who is heard, who may change what, and who is told why not.
use super::certificates::{Authority, Valid};
use super::estate::{ATTACH_STUCK, Estate, PATIENCE, fault, wait_until};
use plimsoll_host::api::client::{Client, ClientError};
use plimsoll_host::api::{Access, Credentials};
use plimsoll_host::config::Config;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Who signs, and what the settings make of that.
struct Site {
    folder: tempfile::TempDir,
    own: Authority,
    others: Authority,
}

const USUAL: &str = "may-change = [\"ops.test\", \"spiffe://test/ops/*\"]\nmay-read = [\"*.watch.test\"]\n";

impl Site {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (own, others) = (Authority::new(folder.path(), "own"), Authority::new(folder.path(), "others"));
        own.sign("server", &["localhost", "127.0.0.1"], Valid::Now, "own");
        Self { folder, own, others }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn config(&self, listen: &str, roles: &str) -> Config {
        let text = format!(
            "[api]\nlisten = \"{listen}\"\ncertificate = \"server.pem\"\nkey = \"server.key\"\nclient-ca = \"own.ca\"\n{roles}"
        );
        Config::parse(&text, self.path().join("host.toml").to_str().unwrap()).unwrap()
    }

    fn start(&self) -> (Estate, SocketAddr) {
        let config = self.config("127.0.0.1:0", USUAL);
        let access = Access::prepare(&config.api, &Access::default()).unwrap();
        let address = access.address().unwrap();
        let directory = self.path().join("run");
        fs::create_dir(&directory).unwrap();
        (Estate::for_others(&directory, 2, 1024, access), address)
    }

    fn client(&self, file: &str, names: &[&str]) -> Credentials {
        self.own.sign(file, names, Valid::Now, "own")
    }
}

fn client(address: SocketAddr, credentials: &Credentials) -> Client {
    Client::elsewhere(&format!("https://localhost:{}", address.port()), credentials.clone()).unwrap()
}

fn refusal(address: SocketAddr, credentials: &Credentials) -> String {
    let refused = client(address, credentials).get::<serde_json::Value>("/v1/host").unwrap_err();
    assert!(
        matches!(refused, ClientError::NotAdmitted { .. } | ClientError::NotBelieved { .. }),
        "{refused:?}"
    );
    refused.to_string()
}

#[test]
fn a_client_does_what_the_names_of_its_certificate_may_and_others_are_told_why_they_may_not() {
    let site = Site::new();
    let (estate, address) = site.start();
    let ask = |credentials: &Credentials, method: &str| {
        let body = if method == "PATCH" { b"{\"shares\": 7}".to_vec() } else { Vec::new() };
        let kind = [("content-type", "application/json")];
        client(address, credentials).exchange(method, "/v1/machines/m1", &kind, body).unwrap()
    };
    for (file, name) in [("ops", "ops.test"), ("spiffe", "spiffe://test/ops/ann")] {
        let ops = site.client(file, &[name]);
        assert_eq!((ask(&ops, "GET").status, ask(&ops, "PATCH").status), (200, 200), "{name}");
    }
    let before = estate.json("/v1/machines/m1");
    let watch = site.client("watch", &["one.watch.test"]);
    assert_eq!(ask(&watch, "GET").status, 200);
    // What it shows page by page is more than who may only read gets.
    let pages = |by| client(address, by).exchange("GET", "/v1/machines/m1/pages", &[], Vec::new()).unwrap();
    assert_eq!((pages(&watch).status, pages(&site.client("ops", &["ops.test"])).status), (403, 409));
    for method in ["PATCH", "DELETE", "POST", "PUT", "BREW"] {
        let refused = ask(&watch, method);
        assert_eq!(refused.status, 403, "{method}");
        assert!(fault(&refused).message.contains("may read and change nothing"), "{}", fault(&refused));
    }
    assert_eq!(estate.json("/v1/machines/m1")["settings"], before["settings"]);
    for (file, names, said) in [
        ("stranger", &["ops.test.evil"][..], "a client whose certificate is for ops.test.evil may not speak"),
        ("nobody", &["192.0.2.1"], "whose certificate has no subject alternative name may not speak"),
    ] {
        let refused = ask(&site.client(file, names), "GET");
        assert_eq!(refused.status, 403);
        assert!(fault(&refused).message.contains(said), "{}", fault(&refused));
        assert!(fault(&refused).help.contains("may-read"), "{}", fault(&refused));
    }
}

#[test]
fn without_a_certificate_of_the_right_authority_nobody_is_heard() {
    let site = Site::new();
    let (estate, address) = site.start();
    // Neither in clear,
    let mut plain = TcpStream::connect(address).unwrap();
    plain.set_read_timeout(Some(PATIENCE)).unwrap();
    plain.write_all(b"GET /v1/host HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut heard = Vec::new();
    let _ = plain.read_to_end(&mut heard);
    assert!(!heard.starts_with(b"HTTP"), "{heard:?}");
    // nor without a certificate,
    assert!(anonymous(address, &site.path().join("own.ca")).contains("CertificateRequired"));
    // nor with another's,
    let other = site.others.sign("other", &["ops.test"], Valid::Now, "own");
    let said = refusal(address, &other);
    assert!(
        said.contains("other.pem")
            && said.contains("signed by none of those that the daemon's client-ca names"),
        "{said}"
    );
    // nor with one of another time: which its owner is told before anybody is asked, if his clock is right.
    for (valid, said) in
        [(Valid::Before, "has expired on 2021-01-01"), (Valid::Later, "is not valid before 2119")]
    {
        let old = site.own.sign("old", &["ops.test"], valid, "own");
        let refused = Client::elsewhere(&format!("https://{address}"), old).unwrap_err().to_string();
        assert!(refused.contains("old.pem") && refused.contains(said), "{refused}");
    }
    assert!(shows_expired(address, &site).contains("CertificateExpired"));
    assert_eq!(
        client(address, &site.client("ops", &["ops.test"])).get::<serde_json::Value>("/v1/host").unwrap()["machines"],
        2
    );
    assert!(estate.get("/metrics").body.len() > 100);
}

/// What a client hears that shows what it is told to.
fn heard(address: SocketAddr, config: rustls::ClientConfig) -> String {
    let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
    let mut connection = rustls::ClientConnection::new(std::sync::Arc::new(config), name).unwrap();
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut stream = rustls::Stream::new(&mut connection, &mut socket);
    let _ = stream.write_all(b"GET /v1/host HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    let mut text = String::new();
    match stream.read_to_string(&mut text) {
        Ok(_) => text,
        Err(error) => format!("{error:?}"),
    }
}

fn builder(authority: &Path) -> rustls::ConfigBuilder<rustls::ClientConfig, rustls::client::WantsClientCert> {
    use rustls::pki_types::pem::PemObject;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(rustls::pki_types::CertificateDer::from_pem_file(authority).unwrap()).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider);
    builder.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots)
}

fn anonymous(address: SocketAddr, authority: &Path) -> String {
    heard(address, builder(authority).with_no_client_auth())
}

/// A client that shows that certificate, whatever it says.
fn showing(by: &Credentials) -> rustls::ClientConfig {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let chain = vec![CertificateDer::from_pem_file(&by.certificate).unwrap()];
    let key = PrivateKeyDer::from_pem_file(&by.key).unwrap();
    builder(&by.authority).with_client_auth_cert(chain, key).unwrap()
}

fn shows_expired(address: SocketAddr, site: &Site) -> String {
    heard(address, showing(&site.own.sign("old", &["ops.test"], Valid::Before, "own")))
}

#[test]
fn a_daemon_that_is_not_the_one_that_is_meant_is_told_nothing() {
    let site = Site::new();
    let (estate, address) = site.start();
    let ops = site.client("ops", &["ops.test"]);
    let strange = Credentials { authority: site.path().join("others.ca"), ..ops.clone() };
    let said = refusal(address, &strange);
    assert!(said.contains("others.ca") && said.contains("--cacert"), "{said}");
    let other = Client::elsewhere(&format!("https://127.0.0.2:{}", address.port()), ops.clone()).unwrap();
    let said = other.get::<serde_json::Value>("/v1/host").unwrap_err().to_string();
    // It listens at 127.0.0.1 only.
    assert!(said.contains("nobody can be reached at https://127.0.0.2:"), "{said}");
    site.own.sign("server", &["web3.test"], Valid::Now, "own");
    let access =
        Access::prepare(&site.config("127.0.0.1:0", USUAL).api, &estate.admission().access()).unwrap();
    estate.admission().admit(access).unwrap();
    let said = refusal(address, &ops);
    assert!(said.contains("web3.test"), "{said}");
    for (url, why) in [
        ("http://localhost:1", "nothing is said in clear"),
        ("localhost:1", "does not begin with https://"),
        ("https://localhost", "the port is missing"),
        ("https://localhost:1/v1", "something behind the port"),
        ("https://a b:1", "this is no address"),
    ] {
        let refused = Client::elsewhere(url, ops.clone()).unwrap_err().to_string();
        assert!(refused.contains(why), "{url}: {refused}");
    }
}

#[test]
fn files_with_which_nobody_could_be_met_are_refused_by_name() {
    let site = Site::new();
    let refused = |roles: &str| {
        let config = site.config("127.0.0.1:0", USUAL).api;
        let refused = Access::prepare(&config, &Access::default()).expect_err(roles);
        let said = plimsoll_linux::explain(&refused);
        assert_eq!(plimsoll_linux::explain(&Access::check(&config).expect_err(roles)), said);
        said
    };
    let (key, pem) = (site.path().join("server.key"), site.path().join("server.pem"));
    for mode in [0o644, 0o604, 0o660] {
        fs::set_permissions(&key, fs::Permissions::from_mode(mode)).unwrap();
        let said = refused("open");
        assert!(said.contains("server.key") && said.contains(&format!("mode {mode:04o}")), "{said}");
    }
    site.own.sign("server", &["localhost"], Valid::Before, "own");
    assert!(refused("old").contains("server.pem\" has expired on 2021-01-01"), "{}", refused("old"));
    site.own.sign("server", &["localhost"], Valid::Later, "own");
    assert!(refused("early").contains("is not valid before 2119-01-01"));
    site.own.sign("server", &[], Valid::Now, "own");
    assert!(refused("nameless").contains("has no subject alternative name"));
    site.own.sign("server", &["localhost"], Valid::Now, "own");
    let other = site.own.sign("other", &["localhost"], Valid::Now, "own");
    fs::copy(&other.key, &key).unwrap();
    let said = refused("mismatch");
    assert!(
        said.contains("server.key\" is not that of the certificate") && said.contains("server.pem"),
        "{said}"
    );
    fs::write(&key, "no key").unwrap();
    assert!(refused("no key").contains("holds no key: it is to be PEM"));
    fs::remove_file(&key).unwrap();
    assert!(
        refused("missing").contains("server.key\" cannot be read: No such file"),
        "{}",
        refused("missing")
    );
    fs::write(&pem, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    assert!(refused("damaged").contains("server.pem\" makes no sense"));
    fs::write(&pem, "").unwrap();
    assert!(refused("empty").contains("holds no certificate"));
    site.own.sign("server", &["localhost"], Valid::Now, "own");
    fs::write(site.path().join("own.ca"), "").unwrap();
    assert!(refused("authority").contains("own.ca\" holds no certificate authority"));
}

#[test]
fn a_port_that_another_has_is_refused_by_its_address() {
    let site = Site::new();
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap().to_string();
    let refused = Access::prepare(&site.config(&address, USUAL).api, &Access::default()).unwrap_err();
    assert!(refused.to_string().contains(&format!("cannot listen on {address}")), "{refused}");
}

#[test]
fn clients_that_stall_before_they_show_a_certificate_keep_nobody_waiting() {
    let site = Site::new();
    let (_estate, address) = site.start();
    let ops = client(address, &site.client("ops", &["ops.test"]));
    // More than there are places for, half of which begin and do not go on.
    let stalled: Vec<TcpStream> = (0..300)
        .map(|number| {
            let mut stream = TcpStream::connect(address).unwrap();
            if number % 2 == 0 {
                stream.write_all(&[22, 3, 1, 2, 0, 1]).unwrap();
            }
            stream
        })
        .collect();
    for _ in 0..5 {
        assert_eq!(ops.get::<serde_json::Value>("/v1/host").unwrap()["machines"], 2);
    }
    let mut oldest = &stalled[0];
    oldest.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_ne!(
        oldest.read(&mut [0]).map_err(|error| error.kind()),
        Err(std::io::ErrorKind::WouldBlock),
        "it keeps its place"
    );
}

/// What a client says that is believed.
fn says(address: SocketAddr, by: &Credentials, text: &str) -> impl Read + Write + use<> {
    let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
    let connection = rustls::ClientConnection::new(std::sync::Arc::new(showing(by)), name).unwrap();
    let socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut stream = rustls::StreamOwned::new(connection, socket);
    stream.write_all(text.as_bytes()).unwrap();
    stream
}

/// The beginning of an answer, and the rest of it.
fn begun<S: Read>(mut stream: S) -> ([u8; 12], S) {
    let mut begin = [0; 12];
    stream.read_exact(&mut begin).unwrap();
    (begin, stream)
}

#[test]
fn clients_from_elsewhere_are_bounded_and_take_no_place_of_this_hosts_users() {
    let site = Site::new();
    let (estate, address) = site.start();
    let watch = site.client("watch", &["one.watch.test"]);
    let get = || begun(says(address, &watch, "GET /v1/host HTTP/1.1\r\nhost: x\r\n\r\n"));
    let connected: Vec<_> = (0..64).map(|_| get()).collect();
    assert!(connected.iter().all(|(begin, _)| begin == b"HTTP/1.1 200"));
    assert_eq!(&get().0, b"HTTP/1.1 429");
    assert_eq!(estate.get("/v1/host").status, 200, "they keep this host's users out");
    drop(connected);
    wait_until("their places are free again", || {
        client(address, &watch).get::<serde_json::Value>("/v1/host").is_ok()
    });
}

#[test]
fn clients_from_elsewhere_that_listen_or_attach_keep_no_user_of_this_host_from_it() {
    const LISTEN: &str = "GET /v1/events HTTP/1.1\r\nhost: x\r\n\r\n";
    let site = Site::new();
    let (estate, address) = site.start();
    let ops = site.client("ops", &["ops.test"]);
    let listening: Vec<_> = (0..16).map(|_| begun(says(address, &ops, LISTEN))).collect();
    assert!(listening.iter().all(|(begin, _)| begin == b"HTTP/1.1 200"));
    assert_eq!(&begun(says(address, &ops, LISTEN)).0, b"HTTP/1.1 429");
    let mut here = UnixStream::connect(estate.directory.join("api.sock")).unwrap();
    here.write_all(LISTEN.as_bytes()).unwrap();
    assert_eq!(&begun(here).0, b"HTTP/1.1 200");
    let _attaching: Vec<_> = (0..4).map(|_| says(address, &ops, ATTACH_STUCK)).collect();
    wait_until("all are being attached to", || *estate.gate.openings.lock() == 4);
    assert_eq!(&begun(says(address, &ops, ATTACH_STUCK)).0, b"HTTP/1.1 429");
    let attached = estate.send("POST", "/v1/machines", r#"{"machine": "other"}"#);
    assert_eq!(attached.status, 201, "{}", String::from_utf8_lossy(&attached.body));
    estate.gate.open();
}

#[test]
fn files_that_are_read_again_count_for_those_who_are_connected_too() {
    let site = Site::new();
    let (estate, address) = site.start();
    let ops = site.client("ops", &["ops.test"]);
    let get = || client(address, &ops).exchange("GET", "/v1/host", &[], Vec::new());
    assert_eq!(get().unwrap().status, 200);
    let gate = estate.admission();
    // Another certificate, and another list, at the same address: nobody is refused a connection meanwhile.
    let admit = |roles: &str| {
        let access = Access::prepare(&site.config("127.0.0.1:0", roles).api, &gate.access()).unwrap();
        assert_eq!(access.address(), Some(address));
        gate.admit(access).unwrap();
    };
    site.own.sign("server", &["localhost"], Valid::Now, "own");
    admit("may-read = [\"ops.test\"]\n");
    wait_until("the list is in force", || {
        client(address, &ops).exchange("POST", "/v1/machines/m1/pause", &[], Vec::new()).unwrap().status
            == 403
    });
    assert_eq!(get().unwrap().status, 200);
    admit("may-read = [\"nobody.test\"]\n");
    wait_until("it is heard no more", || get().unwrap().status == 403);
    // Files that are wrong change nothing.
    fs::write(site.path().join("server.pem"), "").unwrap();
    assert!(Access::prepare(&site.config("127.0.0.1:0", USUAL).api, &gate.access()).is_err());
    assert_eq!(get().unwrap().status, 403);
    // No address, no listener.
    gate.admit(Access::default()).unwrap();
    wait_until("nobody listens there", || TcpStream::connect(address).is_err());
    assert_eq!(estate.get("/v1/host").status, 200);
}
