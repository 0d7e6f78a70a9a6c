//! Which requests there are.
//!
//! Enters: requests whose sender may ask. Leaves: answers. Whatever reads looks at the last moment; whatever changes is an
//! [`Order`], and shows the machine as the decision after it found it.
use super::archive::{Archive, Happening, Sample};
use super::exchange::{Door, Moment, Order};
use super::fault::{Code, Fault};
use super::model::{Found, Groups, Host, Machine, MachineKind, Machines, Map, Table};
use super::settings::{Settings, group_called};
use crate::config::Role;
use crate::line::Line;
use crate::metrics;
use crate::roster::Opened;
use crate::why::Entry;
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Json, Response};
use axum::{Extension, Router};
use futures_util::stream::{self, Stream};
use parking_lot::Mutex;
use plimsoll_policy::Position;
use plimsoll_types::{ByteCount, MachineId, PAGE_SIZE};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast};
use utoipa::{IntoParams, OpenApi, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// Machines of one answer, unless it is said otherwise, and at most.
const PAGE_USUAL: usize = 100;
const PAGE_MAX: usize = 1000;
/// How long a body may take to arrive, and a VMM's interface to be attached to: what a request can wait for beside an order, which has
/// bounds of its own. There is none around all of it, which could not say what became of the order.
const PATIENCE: Duration = Duration::from_secs(10);
/// Clients of one kind that may listen to events at the same time.
const LISTENERS_MAX: usize = 16;
/// Machines that may be attached to at the same time for clients of one kind.
pub(super) const OPENINGS_MAX: usize = 4;
/// Pages of one answer: the words of 1 GiB are read in as long as a map is drawn.
const TABLE_MAX: usize = 1 << 18;
/// The longest name.
const NAME_MAX: usize = 256;
/// The most a machine may be told to give at once: more than any host has.
const RECLAIM_MAX: u64 = 1 << 50;

/// Attaches to a machine. It is called on a thread that may wait.
pub type Opener = dyn Fn(&Attach) -> Result<Opened, Fault> + Send + Sync;

/// What all clients of one kind may have under way beside requests that are answered at once.
#[derive(Clone)]
struct Allowance {
    listeners: Arc<Semaphore>,
    openings: Arc<Semaphore>,
}

impl Allowance {
    fn new() -> Self {
        let [listeners, openings] = [LISTENERS_MAX, OPENINGS_MAX].map(|most| Arc::new(Semaphore::new(most)));
        Self { listeners, openings }
    }
}

/// What requests are answered from.
pub(super) struct App {
    pub(super) door: Door,
    pub(super) archive: Mutex<Archive>,
    pub(super) events: broadcast::Sender<Arc<Happening>>,
    pub(super) opener: Box<Opener>,
    /// Requests by status.
    pub(super) answered: Mutex<BTreeMap<u16, u64>>,
    /// Clients that were turned away.
    pub(super) turned_away: AtomicU64,
}

impl App {
    pub(super) fn new(door: Door, opener: Box<Opener>) -> Self {
        Self {
            door,
            archive: Mutex::default(),
            // Whoever is slower than that misses some, and is told how many.
            events: broadcast::Sender::new(1024),
            opener,
            answered: Mutex::default(),
            turned_away: AtomicU64::new(0),
        }
    }

    fn found(&self, key: &str) -> Result<(Arc<Moment>, MachineId), Fault> {
        let moment = self.door.moment()?;
        match moment.find(key) {
            Found::One(id) => Ok((moment, id)),
            Found::None => Err(Fault::new(Code::NotFound, format!("no machine is called {}", shown(key)))),
            Found::Several => {
                let text = format!("several machines are called {}", shown(key));
                Err(Fault::new(Code::Conflict, text).help("name the one by its process id"))
            }
        }
    }

    /// The machine of an order, as the decision after it found it.
    async fn obey(&self, order: Order) -> Result<Machine, Fault> {
        let id = self.door.order(order).await?.ok_or_else(Fault::gone)?;
        let moment = self.door.moment()?;
        self.machine(&moment, id)
    }

    fn machine(&self, moment: &Moment, id: MachineId) -> Result<Machine, Fault> {
        let machine = moment.machine(id).ok_or_else(Fault::gone)?;
        Ok(Machine { reason: self.archive.lock().reason(id), ..machine })
    }
}

/// A name as it may stand in a sentence.
fn shown(name: &str) -> String {
    const MAX: usize = 64;
    let cut: String = name.chars().take(MAX).collect();
    format!("{cut:?}{}", if cut.len() < name.len() { "..." } else { "" })
}

/// A machine to manage from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// Its name, UUID, or the process id of its VMM.
    #[schema(min_length = 1, max_length = 256)]
    pub machine: String,
    /// Its QMP monitor, if nobody else uses it: for its balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub qmp: Option<PathBuf>,
    /// The API socket of a Cloud Hypervisor or Firecracker, if its command line does not name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub api: Option<PathBuf>,
    /// What is said about it.
    #[serde(default)]
    pub settings: Settings,
}

/// How much to take from a machine, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Reclaim {
    /// So much.
    #[schema(minimum = 4096, maximum = 1_125_899_906_842_624_u64)]
    pub bytes: u64,
}

/// What machines, their VMMs and the daemon may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// So much.
    #[schema(minimum = 33_554_432)]
    pub bytes: u64,
}

/// Where a machine stands, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Why {
    /// Its name.
    pub name: String,
    /// By which rule of the settings it is managed, if by one: its number, file and line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// When was decided last, in milliseconds since the loop began.
    pub at_ms: u64,
    /// What it takes up.
    pub consumed_bytes: u64,
    /// What it uses.
    pub active_bytes: u64,
    /// What it has a right to if all want all they may have.
    pub entitlement_bytes: u64,
    /// What it is to come to now.
    pub target_bytes: u64,
    /// What was decided or found last, the newest last.
    pub entries: Vec<Entry>,
}

impl Why {
    /// Of a machine that stood there at a decision, `at_ms` after the loop began.
    pub fn of(name: String, at_ms: u64, position: &Position, entries: Vec<Entry>) -> Self {
        let Position { consumed, active, entitlement, target, .. } = *position;
        Self {
            name,
            rule: None,
            at_ms,
            consumed_bytes: consumed.0,
            active_bytes: active.0,
            entitlement_bytes: entitlement.0,
            target_bytes: target.0,
            entries,
        }
    }
}

/// The last ten minutes of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct History {
    /// Its name.
    pub name: String,
    /// Every five seconds, the newest last.
    pub samples: Vec<Sample>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Page {
    /// How many at most; 100 if it is left out.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
    /// Begin after the machine of this number: `next` of the answer before.
    after: Option<u32>,
    /// Those of this group only.
    group: Option<String>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Nothing {}

/// A JSON body, or the fault that it is none.
struct Body<T>(T);

impl<T: serde::de::DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Fault;
    async fn from_request(request: Request, state: &S) -> Result<Self, Fault> {
        let arrived = tokio::time::timeout(PATIENCE, Json::from_request(request, state)).await;
        let Json(value) = arrived.map_err(|_| late("the body took"))??;
        Ok(Self(value))
    }
}

/// A query, or the fault that it makes no sense.
struct Asked<T>(T);

impl<T: serde::de::DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = Fault;
    async fn from_request_parts(parts: &mut axum::http::request::Parts, state: &S) -> Result<Self, Fault> {
        let Query(value) = Query::from_request_parts(parts, state).await?;
        Ok(Self(value))
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
struct Key {
    /// Its name, or the process id of its VMM.
    machine: String,
}

/// A machine's name out of the path.
struct Named(String);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = Fault;
    async fn from_request_parts(parts: &mut axum::http::request::Parts, state: &S) -> Result<Self, Fault> {
        let Path(Key { machine }) = Path::from_request_parts(parts, state).await?;
        // A query that nobody reads is one that somebody believes in.
        let Asked(Nothing {}) = Asked::from_request_parts(parts, state).await?;
        Ok(Self(machine))
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct From {
    /// Begin with this page: `next` of the answer before; 0 if it is left out.
    first: Option<u64>,
}

type Here = State<Arc<App>>;

/// The machines, by number.
#[utoipa::path(
    get, path = "/v1/machines", tag = "machines",
    params(Page), responses((status = 200, body = Machines), Fault)
)]
async fn list(State(app): Here, Asked(page): Asked<Page>) -> Result<Json<Machines>, Fault> {
    let limit = page.limit.map_or(Some(PAGE_USUAL), |limit| usize::try_from(limit).ok());
    let limit = limit.filter(|limit| (1..=PAGE_MAX).contains(limit)).ok_or_else(|| {
        Fault::new(
            Code::BadRequest,
            format!("a limit of {}: use 1 to {PAGE_MAX}", page.limit.unwrap_or_default()),
        )
    })?;
    let moment = app.door.moment()?;
    let group = page.group.as_deref().map(|name| group_called(name, &moment.groups)).transpose()?;
    let mut found = moment.page(page.after, limit, group);
    let archive = app.archive.lock();
    found.machines.iter_mut().for_each(|one| one.reason = archive.reason(MachineId(one.id)));
    drop(archive);
    Ok(Json(found))
}

/// Manage a running machine from outside.
#[utoipa::path(
    post, path = "/v1/machines", tag = "machines",
    request_body = Attach, responses((status = 201, body = Machine), Fault)
)]
async fn attach(
    State(app): Here,
    Extension(allowance): Extension<Allowance>,
    Asked(Nothing {}): Asked<Nothing>,
    Body(attach): Body<Attach>,
) -> Result<(StatusCode, Json<Machine>), Fault> {
    if !(1..=NAME_MAX).contains(&attach.machine.chars().count()) {
        return Err(Fault::new(
            Code::Unprocessable,
            format!("a machine's name has 1 to {NAME_MAX} characters"),
        ));
    }
    // Before anything is looked for: what makes no sense here makes none there.
    attach.settings.over(&crate::config::MachineConfig::default(), &app.door.moment()?.groups)?;
    let many = |_| Fault::new(Code::TooMany, format!("{OPENINGS_MAX} machines are being attached to"));
    let opening = allowance.openings.try_acquire_owned().map_err(many)?;
    let (opener, settings) = (Arc::clone(&app), attach.settings.clone());
    let opened = tokio::task::spawn_blocking(move || {
        // Its place is free when the work has ended, whoever waits for that.
        let _opening = opening;
        (opener.opener)(&attach)
    });
    let opened = tokio::time::timeout(PATIENCE, opened).await.map_err(|_| late("attaching to it took"))?;
    let opened = opened
        .map_err(|error| Fault::new(Code::Failed, format!("it could not be attached to: {error}")))??;
    let machine = app.obey(Order::Attach(Box::new(opened), settings)).await?;
    Ok((StatusCode::CREATED, Json(machine)))
}

/// A machine.
#[utoipa::path(
    get, path = "/v1/machines/{machine}", tag = "machines",
    params(Key), responses((status = 200, body = Machine), Fault)
)]
async fn show(State(app): Here, Named(name): Named) -> Result<Json<Machine>, Fault> {
    let (moment, id) = app.found(&name)?;
    app.machine(&moment, id).map(Json)
}

/// Change a machine's settings. What is left out stays.
#[utoipa::path(
    patch, path = "/v1/machines/{machine}", tag = "machines",
    params(Key), request_body = Settings, responses((status = 200, body = Machine), Fault)
)]
async fn set(
    State(app): Here,
    Named(name): Named,
    Body(settings): Body<Settings>,
) -> Result<Json<Machine>, Fault> {
    let (_, id) = app.found(&name)?;
    app.obey(Order::Set(id, settings)).await.map(Json)
}

/// Let a machine go, or wait no longer for one. It goes on, and nothing of plimsoll stays with it. 204: it was let go. 202: it was
/// handed over by its VMM, and its memory is brought back; it is gone from the machines when that is done, and is managed as
/// before, with the reason as its `trouble`, when that was in vain.
#[utoipa::path(
    delete, path = "/v1/machines/{machine}", tag = "machines",
    params(Key), responses((status = 204), (status = 202, body = Machine), Fault)
)]
async fn release(State(app): Here, Named(name): Named) -> Result<Response, Fault> {
    let order = match app.found(&name) {
        Ok((_, id)) => Order::Release(id),
        Err(_) if app.door.moment()?.waiting.iter().any(|(waiting, _)| *waiting == name) => {
            Order::Forgo(name)
        }
        Err(fault) => return Err(fault),
    };
    let leaving = app.door.order(order).await?;
    // What has come home at once is not there any more.
    let leaving = leaving.and_then(|id| app.door.moment().ok()?.machine(id));
    Ok(leaving.map_or_else(
        || StatusCode::NO_CONTENT.into_response(),
        |machine| (StatusCode::ACCEPTED, Json(machine)).into_response(),
    ))
}

/// Take nothing from a machine until it is resumed.
#[utoipa::path(
    post, path = "/v1/machines/{machine}/pause", tag = "machines",
    params(Key), responses((status = 200, body = Machine), Fault)
)]
async fn pause(State(app): Here, Named(name): Named) -> Result<Json<Machine>, Fault> {
    let (_, id) = app.found(&name)?;
    app.obey(Order::Pause(id, true)).await.map(Json)
}

/// Take from a machine again.
#[utoipa::path(
    post, path = "/v1/machines/{machine}/resume", tag = "machines",
    params(Key), responses((status = 200, body = Machine), Fault)
)]
async fn resume(State(app): Here, Named(name): Named) -> Result<Json<Machine>, Fault> {
    let (_, id) = app.found(&name)?;
    app.obey(Order::Pause(id, false)).await.map(Json)
}

/// Have so much taken from a machine, once, whatever its target. It is begun when this is answered; what came of it shows in
/// the machine's memory.
#[utoipa::path(
    post, path = "/v1/machines/{machine}/reclaim", tag = "machines",
    params(Key), request_body = Reclaim, responses((status = 202, body = Machine), Fault)
)]
async fn reclaim(
    State(app): Here,
    Named(name): Named,
    Body(Reclaim { bytes }): Body<Reclaim>,
) -> Result<(StatusCode, Json<Machine>), Fault> {
    if !(PAGE_SIZE as u64..=RECLAIM_MAX).contains(&bytes) {
        let text = format!("{bytes} bytes cannot be taken: use {PAGE_SIZE} to {RECLAIM_MAX}");
        return Err(Fault::new(Code::Unprocessable, text));
    }
    let (_, id) = app.found(&name)?;
    let machine = app.obey(Order::Reclaim(id, ByteCount(bytes).pages_ceil())).await?;
    Ok((StatusCode::ACCEPTED, Json(machine)))
}

/// Why the last decisions about a machine were made.
#[utoipa::path(
    get, path = "/v1/machines/{machine}/why", tag = "machines",
    params(Key), responses((status = 200, body = Why), Fault)
)]
async fn why(State(app): Here, Named(name): Named) -> Result<Json<Why>, Fault> {
    let (moment, id) = app.found(&name)?;
    let position = moment.tick.plan.machines.iter().find(|one| one.machine == id);
    let position = position.ok_or_else(|| Fault::new(Code::Conflict, "nothing was decided about it yet"))?;
    let (name, at_ms) = (moment.name(id).unwrap_or_default(), moment.tick.view.now_ms);
    let why = Why::of(name, at_ms, position, app.archive.lock().entries(id));
    Ok(Json(Why { rule: moment.rules.get(&id).cloned(), ..why }))
}

/// The last ten minutes of a machine.
#[utoipa::path(
    get, path = "/v1/machines/{machine}/history", tag = "machines",
    params(Key), responses((status = 200, body = History), Fault)
)]
async fn history(State(app): Here, Named(name): Named) -> Result<Json<History>, Fault> {
    let (moment, id) = app.found(&name)?;
    let name = moment.name(id).unwrap_or_default();
    Ok(Json(History { name, samples: app.archive.lock().samples(id) }))
}

/// Where a machine's memory is, in at most 256 cells from its first page to its last.
#[utoipa::path(
    get, path = "/v1/machines/{machine}/map", tag = "machines",
    params(Key), responses((status = 200, body = Map), Fault)
)]
async fn map(State(app): Here, Named(name): Named) -> Result<Json<Map>, Fault> {
    let (moment, id) = app.found(&name)?;
    let unseen =
        || Fault::new(Code::Conflict, "it was not looked at yet").help("wait a second and ask again");
    moment.map(id).map(Json).ok_or_else(unseen)
}

/// What the manager's words say of each page of a machine that its VMM has handed over, at most 262,144 pages at a time. Words change
/// meanwhile. For those who may change things: it shows what a guest touches, page by page.
#[utoipa::path(
    get, path = "/v1/machines/{machine}/pages", tag = "machines",
    params(Key, From), responses((status = 200, body = Table), Fault)
)]
async fn pages(
    State(app): Here,
    Extension(role): Extension<Role>,
    path: Result<Path<Key>, PathRejection>,
    Asked(From { first }): Asked<From>,
) -> Result<Json<Table>, Fault> {
    if role != Role::Change {
        let text = "what a guest touches, page by page, is shown to those who may change things";
        return Err(Fault::new(Code::Forbidden, text).help("/map shows where its memory is"));
    }
    let (Path(Key { machine }), first) = (path?, first.unwrap_or(0));
    let (moment, id) = app.found(&machine)?;
    let Some(table) = moment.table(id, first, TABLE_MAX) else {
        let outside = moment.machine(id).ok_or_else(Fault::gone)?.kind == MachineKind::Attached;
        let help =
            if outside { "`plimsoll maps` shows where they are" } else { "wait a second and ask again" };
        let text = if outside {
            "it is managed from outside: there are no words of its pages, which are where its kernel's page map says"
        } else {
            "it was not looked at yet"
        };
        return Err(Fault::new(Code::Conflict, text).help(help));
    };
    match first < table.pages {
        true => Ok(Json(table)),
        false => {
            Err(Fault::new(Code::BadRequest, format!("no page {first}: it has {} of them", table.pages)))
        }
    }
}

/// The host.
#[utoipa::path(get, path = "/v1/host", tag = "host", responses((status = 200, body = Host), Fault))]
async fn host(State(app): Here, Asked(Nothing {}): Asked<Nothing>) -> Result<Json<Host>, Fault> {
    Ok(Json(app.door.moment()?.host()))
}

/// How deep the host is loaded, and what would break first.
#[utoipa::path(get, path = "/v1/host/line", tag = "host", responses((status = 200, body = Line), Fault))]
async fn line(State(app): Here, Asked(Nothing {}): Asked<Nothing>) -> Result<Json<Line>, Fault> {
    let moment = app.door.moment()?;
    let names = moment.berths.iter().map(|(id, berth)| (*id, &*berth.name)).collect();
    let line = Line::drawn(&moment.tick, &moment.tree, &names, moment.own);
    Ok(Json(Line { stores: Some(moment.stores), ..line }))
}

/// Give machines, their VMMs and the daemon another budget.
#[utoipa::path(
    put, path = "/v1/host/budget", tag = "host",
    request_body = Budget, responses((status = 200, body = Host), Fault)
)]
async fn budget(
    State(app): Here,
    Asked(Nothing {}): Asked<Nothing>,
    Body(Budget { bytes }): Body<Budget>,
) -> Result<Json<Host>, Fault> {
    app.door.order(Order::Budget(ByteCount(bytes))).await?;
    Ok(Json(app.door.moment()?.host()))
}

/// The groups.
#[utoipa::path(get, path = "/v1/groups", tag = "host", responses((status = 200, body = Groups), Fault))]
async fn groups(State(app): Here, Asked(Nothing {}): Asked<Nothing>) -> Result<Json<Groups>, Fault> {
    Ok(Json(app.door.moment()?.groups()))
}

/// What is done from now on, as server-sent events: `happened` with a Happening as its data, `missed` with how many a client
/// that is too slow has missed.
#[utoipa::path(
    get, path = "/v1/events", tag = "host",
    responses((status = 200, body = Happening, content_type = "text/event-stream"), Fault)
)]
async fn events(
    State(app): Here,
    Extension(allowance): Extension<Allowance>,
    Asked(Nothing {}): Asked<Nothing>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Fault> {
    let permit = allowance.listeners.try_acquire_owned();
    let permit =
        permit.map_err(|_| Fault::new(Code::TooMany, format!("{LISTENERS_MAX} clients listen already")))?;
    Ok(Sse::new(listen(app.events.subscribe(), permit)).keep_alive(KeepAlive::default()))
}

fn listen(
    events: broadcast::Receiver<Arc<Happening>>,
    permit: OwnedSemaphorePermit,
) -> impl Stream<Item = Result<Event, Infallible>> {
    stream::unfold((events, permit), |(mut events, permit)| async move {
        let event = match events.recv().await {
            Ok(happening) => Event::default().event("happened").json_data(&*happening).unwrap_or_default(),
            Err(broadcast::error::RecvError::Lagged(count)) => {
                Event::default().event("missed").data(count.to_string())
            }
            Err(broadcast::error::RecvError::Closed) => return None,
        };
        Some((Ok(event), (events, permit)))
    })
}

/// Metrics for Prometheus, in OpenMetrics' form where the client takes that.
#[utoipa::path(
    get, path = "/metrics", tag = "host",
    responses((status = 200, content((String = "text/plain"), (String = "application/openmetrics-text"))), Fault)
)]
async fn measured(
    State(app): Here,
    Asked(Nothing {}): Asked<Nothing>,
    headers: HeaderMap,
) -> Result<Response, Fault> {
    let accepts = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let format = metrics::Format::accepted(accepts);
    let moment = app.door.moment()?;
    let answered = app.answered.lock().clone();
    let clients = metrics::Clients { answered, turned_away: app.turned_away.load(Ordering::Relaxed) };
    let page = metrics::page(format, &moment, &app.archive.lock(), &clients);
    Ok(([(header::CONTENT_TYPE, format.content_type())], page).into_response())
}

/// This description.
async fn description() -> Response {
    let kind = [(header::CONTENT_TYPE, "application/json")];
    (kind, openapi()).into_response()
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "plimsoll",
        description = "The memory manager of this host: its machines, their settings, and why it does what it does. HTTP on a Unix socket, or over TLS.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0")
    ),
    components(schemas(Fault)),
    tags(
        (name = "machines", description = "The machines that are managed."),
        (name = "host", description = "The host, and all its machines together.")
    )
)]
struct Description;

fn table() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(list, attach))
        .routes(routes!(show, set, release))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(reclaim))
        .routes(routes!(why))
        .routes(routes!(history))
        .routes(routes!(map))
        .routes(routes!(pages))
        .routes(routes!(host))
        .routes(routes!(line))
        .routes(routes!(budget))
        .routes(routes!(groups))
        .routes(routes!(events))
        .routes(routes!(measured))
}

/// The description of the API (OpenAPI 3.1), as `docs/openapi.json` has it.
pub fn openapi() -> String {
    let description = table().split_for_parts().1;
    description.to_pretty_json().unwrap_or_default() + "\n"
}

/// Everything that answers clients of one kind.
pub(super) fn router(app: &Arc<App>) -> Router {
    let (router, _) = table().split_for_parts();
    router
        .route("/openapi.json", axum::routing::get(description))
        .fallback(async || {
            Fault::new(Code::NotFound, "there is nothing at this path")
                .help("see /openapi.json for what can be asked")
        })
        .method_not_allowed_fallback(async || Fault::new(Code::MethodNotAllowed, "that cannot be done to it"))
        .layer(middleware::from_fn_with_state(Arc::clone(app), within_limits))
        .layer(Extension(Allowance::new()))
        .with_state(Arc::clone(app))
}

/// Whether the one who asks may have that done. Whatever changes something is asked for by a method that says so.
fn is_allowed(request: &Request) -> Result<(), Fault> {
    match request.extensions().get() {
        Some(Role::Change) => Ok(()),
        Some(Role::Read) if request.method().is_safe() => Ok(()),
        Some(Role::Read) => Err(Fault::new(Code::Forbidden, "this client may read and change nothing")
            .help("nothing was changed; [api] of the daemon's settings says who may")),
        None => Err(Fault::new(Code::Forbidden, "nobody says who asks")),
    }
}

/// Something took too long that had to be over before anything is changed.
fn late(what: &str) -> Fault {
    Fault::new(Code::Busy, format!("{what} longer than {} s", PATIENCE.as_secs()))
}

/// Lets nobody do more than it may, and counts requests.
async fn within_limits(State(app): Here, request: Request, next: Next) -> Response {
    let response = match is_allowed(&request) {
        Ok(()) => next.run(request).await,
        Err(fault) => fault.into_response(),
    };
    *app.answered.lock().entry(response.status().as_u16()).or_default() += 1;
    response
}
