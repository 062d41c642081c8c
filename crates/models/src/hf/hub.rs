//! `base_model` as a folder on disk or a hub id `org/name`, perhaps with `@revision`.
//!
//! Files of the hub go into the cache that Python's huggingface_hub uses (`HF_HUB_CACHE`, else `HF_HOME/hub`, else
//! `~/.cache/huggingface/hub`), so either program finds what the other fetched. `HF_ENDPOINT` names another server,
//! `HF_TOKEN` (or the token file of `hf auth login`) opens private models, and `HF_HUB_OFFLINE=1` forbids the network.
//! The file list of one commit is fetched first and all files are taken from that commit. Where the server cannot be
//! reached, a complete copy in the cache is used and a warning is logged.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use regex::Regex;

use super::checkpoint::{INDEX_FILE, SINGLE_FILE, read_weight_map, stays_inside};
use super::error::{HfError, list};
use super::write::COMPANION_FILES;

/// Where the hub is and where its files are kept.
#[derive(Debug, Clone)]
pub struct HubSettings {
    /// The server, without a slash at the end.
    pub endpoint: String,
    /// The folder that holds `models--org--name`.
    pub cache: PathBuf,
    /// Sent as a bearer token, if there is one.
    pub token: Option<String>,
    /// Use the cache only.
    pub offline: bool,
    /// Draw a bar for each file (only on a terminal).
    pub progress: bool,
}

impl HubSettings {
    /// The settings of the environment variables named in the module's documentation.
    ///
    /// # Errors
    /// No home folder to keep the cache in, or an endpoint that is not an address.
    pub fn from_env() -> Result<Self, HfError> {
        let text = |name: &str| {
            std::env::var(name).ok().map(|value| value.trim().to_string()).filter(|value| !value.is_empty())
        };
        let home = match (text("HF_HOME"), text("XDG_CACHE_HOME"), text("HOME").or_else(|| text("USERPROFILE"))) {
            (Some(home), _, _) => PathBuf::from(home),
            (None, Some(cache), _) => Path::new(&cache).join("huggingface"),
            (None, None, Some(home)) => Path::new(&home).join(".cache").join("huggingface"),
            (None, None, None) => {
                return Err(bad_name("HF_HOME", "no home folder to keep downloads in", "set HF_HOME to a folder"));
            }
        };
        let cache = text("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from);
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string());
        let endpoint = endpoint.trim_end_matches('/').to_string();
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            return Err(bad_name(&endpoint, "HF_ENDPOINT is not an address", "it must start with https:// or http://"));
        }
        let token = text("HF_TOKEN")
            .or_else(|| std::fs::read_to_string(home.join("token")).ok().map(|token| token.trim().to_string()));
        let token = token.filter(|token| !token.is_empty());
        let offline = text("HF_HUB_OFFLINE")
            .is_some_and(|value| matches!(value.to_lowercase().as_str(), "1" | "true" | "yes" | "on"));
        Ok(Self { endpoint, cache: absolute(&cache)?, token, offline, progress: true })
    }
}

/// The cache links files by relative paths, which needs absolute ones to start from.
fn absolute(path: &Path) -> Result<PathBuf, HfError> {
    std::path::absolute(path).map_err(|source| HfError::io("find", path, source))
}

/// The folder of a model: the folder of that name if there is one, else the hub's model, downloaded where needed.
///
/// # Errors
/// Neither a folder nor a hub id; the hub refuses, lacks the model, or cannot be reached and the cache is incomplete.
pub fn resolve_model(base_model: &str) -> Result<PathBuf, HfError> {
    match local_folder(base_model)? {
        Some(folder) => Ok(folder),
        None => fetch_model(&HubSettings::from_env()?, base_model),
    }
}

/// `base_model` as an existing folder, or `None` where it is to be asked of the hub.
fn local_folder(base_model: &str) -> Result<Option<PathBuf>, HfError> {
    let path = Path::new(base_model);
    if path.is_dir() {
        return Ok(Some(path.to_path_buf()));
    }
    if path.is_file() {
        return Err(bad_name(
            base_model,
            "is a file, not a model folder",
            "give the folder that holds config.json and the weights",
        ));
    }
    // `models/tiny` next to an existing folder `models` is a mistyped path, not a hub id.
    let beside_existing = path.parent().is_some_and(|parent| !parent.as_os_str().is_empty() && parent.is_dir());
    if parse_id(base_model).is_none() || beside_existing {
        let hint = "give an existing folder, or a hub id such as org/name or org/name@revision";
        return Err(bad_name(base_model, "no such folder, and not a hub id", hint));
    }
    Ok(None)
}

/// Splits `org/name@revision`; `None` where the text is not a hub id.
fn parse_id(text: &str) -> Option<(&str, &str)> {
    let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
    let (org, name) = id.split_once('/')?;
    let is_part = |part: &str| {
        let plain = part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
        plain
            && !part.is_empty()
            && !part.starts_with(['.', '-'])
            && !part.ends_with(['.', '-'])
            && !part.contains("..")
    };
    let good_revision =
        stays_inside(revision) && !revision.contains(char::is_whitespace) && !revision.contains(['?', '#', '%']);
    (is_part(org) && is_part(name) && good_revision).then_some((id, revision))
}

/// Downloads what a language model needs (or finds it in the cache) and returns its folder: `config.json`, the weights,
/// and those [`COMPANION_FILES`] that the model has.
///
/// # Errors
/// As [`resolve_model`].
pub fn fetch_model(hub: &HubSettings, id: &str) -> Result<PathBuf, HfError> {
    let snapshot = Snapshot::open(hub, id, RepoType::Model)?;
    snapshot.fetch("config.json")?;
    for name in COMPANION_FILES {
        if snapshot.has(name) {
            snapshot.fetch(name)?;
        }
    }
    if snapshot.has(INDEX_FILE) {
        let index = snapshot.fetch(INDEX_FILE)?;
        for shard in read_weight_map(&index)?.into_values().collect::<BTreeSet<_>>() {
            if !stays_inside(&shard) {
                return Err(HfError::BadIndex {
                    path: index,
                    problems: vec![format!("`{shard}` is not a file inside the folder")],
                });
            }
            snapshot.fetch(&shard)?;
        }
    } else if snapshot.has(SINGLE_FILE) {
        snapshot.fetch(SINGLE_FILE)?;
    } else {
        return Err(HfError::MissingFile {
            folder: PathBuf::from(id),
            wanted: format!("{SINGLE_FILE} and no {INDEX_FILE}"),
            found: snapshot.files.clone(),
            hint: "only safetensors checkpoints are read: convert the model, or look for a copy that has them"
                .to_string(),
        });
    }
    Ok(snapshot.folder)
}

/// The files of a hub data set that match a pattern (`*` within a folder, `**` across folders, `?` one character), downloaded
/// where needed, in the order of their names. An empty pattern takes every `.jsonl`, `.json` and `.parquet` file.
///
/// # Errors
/// As [`resolve_model`]; no file matches (the text lists what there is).
pub fn resolve_dataset_files(repo: &str, pattern: &str) -> Result<Vec<PathBuf>, HfError> {
    fetch_dataset_files(&HubSettings::from_env()?, repo, pattern)
}

/// [`resolve_dataset_files`] with given settings.
///
/// # Errors
/// As [`resolve_dataset_files`].
pub fn fetch_dataset_files(hub: &HubSettings, repo: &str, pattern: &str) -> Result<Vec<PathBuf>, HfError> {
    let is_data = glob(repo, pattern)?;
    let snapshot = Snapshot::open(hub, repo, RepoType::Dataset)?;
    let mut names: Vec<&String> = snapshot.files.iter().filter(|name| is_data.is_match(name)).collect();
    names.sort();
    if names.is_empty() {
        return Err(HfError::MissingFile {
            folder: PathBuf::from(repo),
            wanted: format!("file matching `{pattern}`"),
            found: snapshot.files.clone(),
            hint: "give a pattern such as data/train*.parquet".to_string(),
        });
    }
    names.into_iter().map(|name| snapshot.fetch(name)).collect()
}

fn glob(repo: &str, pattern: &str) -> Result<Regex, HfError> {
    let source = match pattern {
        "" => r"\.(jsonl|json|parquet)$".to_string(),
        _ => {
            let escaped = regex::escape(pattern).replace(r"\*\*", ".*").replace(r"\*", "[^/]*").replace(r"\?", "[^/]");
            format!("^{escaped}$")
        }
    };
    Regex::new(&source)
        .map_err(|error| bad_name(repo, format!("pattern `{pattern}`: {error}"), "use * and ? as wildcards"))
}

/// One commit of a repository: its folder in the cache and the names of its files.
struct Snapshot<'a> {
    hub: &'a HubSettings,
    id: &'a str,
    folder: PathBuf,
    files: Vec<String>,
    /// `None` where only the cache is used.
    remote: Option<ApiRepo>,
}

impl<'a> Snapshot<'a> {
    fn open(hub: &'a HubSettings, id: &'a str, kind: RepoType) -> Result<Self, HfError> {
        let Some((repo, revision)) = parse_id(id) else {
            return Err(bad_name(id, "not a hub id", "write org/name or org/name@revision"));
        };
        let named = Repo::with_revision(repo.to_string(), kind, revision.to_string());
        if hub.offline {
            return Self::cached(hub, id, &named).ok_or_else(|| not_in_cache(hub, id, "the repository"));
        }
        let api = connect(hub, id)?;
        let info = match with_retries(|| api.repo(named.clone()).info()) {
            Ok(info) => info,
            Err(error) => {
                let cached = Self::cached(hub, id, &named).filter(|_| is_unreachable(&error));
                let Some(cached) = cached else { return Err(hub_error(hub, id, "the file list", &error)) };
                tracing::warn!(
                    "{} cannot be reached ({error}); using the copy of {id} in {}",
                    hub.endpoint,
                    hub.cache.display()
                );
                return Ok(cached);
            }
        };
        if !stays_inside(&info.sha) {
            return Err(hub_failure(
                hub,
                id,
                "the file list",
                format!("bad commit name `{}`", info.sha),
                "check HF_ENDPOINT",
            ));
        }
        let cache = Cache::new(hub.cache.clone()).repo(named);
        // The cache remembers which commit a branch meant, for later runs without a network.
        cache.create_ref(&info.sha).map_err(|source| HfError::io("write into", &hub.cache, source))?;
        let files = info.siblings.into_iter().map(|file| file.rfilename).filter(|name| stays_inside(name)).collect();
        let remote = api.repo(Repo::with_revision(repo.to_string(), kind, info.sha.clone()));
        Ok(Self { hub, id, folder: cache.pointer_path(&info.sha), files, remote: Some(remote) })
    }

    /// The commit that the cache knows under this revision.
    fn cached(hub: &'a HubSettings, id: &'a str, repo: &Repo) -> Option<Self> {
        let folder = hub.cache.join(repo.folder_name());
        let commit = std::fs::read_to_string(folder.join("refs").join(repo.revision()))
            .unwrap_or_else(|_| repo.revision().to_string());
        let folder = folder.join("snapshots").join(commit.trim());
        let mut files = Vec::new();
        walk(&folder, "", &mut files);
        (!files.is_empty()).then_some(Self { hub, id, folder, files, remote: None })
    }

    fn has(&self, name: &str) -> bool {
        self.files.iter().any(|file| file == name)
    }

    /// The path of a file in the cache, downloaded if it is not there yet.
    fn fetch(&self, name: &str) -> Result<PathBuf, HfError> {
        let path = self.folder.join(name);
        if path.exists() {
            return Ok(path);
        }
        let Some(remote) = &self.remote else { return Err(not_in_cache(self.hub, self.id, name)) };
        with_retries(|| remote.download(name)).map_err(|error| hub_error(self.hub, self.id, name, &error))
    }
}

fn connect(hub: &HubSettings, id: &str) -> Result<Api, HfError> {
    let builder = ApiBuilder::from_cache(Cache::new(hub.cache.clone()))
        .with_endpoint(hub.endpoint.clone())
        .with_token(hub.token.clone())
        .with_progress(hub.progress)
        .with_user_agent("lowrank", env!("CARGO_PKG_VERSION"));
    builder.build().map_err(|error| hub_error(hub, id, "a connection", &error))
}

/// Tries again twice where the network failed; a download goes on where it stopped. (The crate's own retries append to a
/// resumed file from its beginning, so they stay off.)
fn with_retries<T>(mut attempt: impl FnMut() -> Result<T, ApiError>) -> Result<T, ApiError> {
    for wait_ms in [300, 1000] {
        match attempt() {
            Err(error) if is_unreachable(&error) => {
                tracing::debug!("{error}; trying again in {wait_ms} ms");
                std::thread::sleep(Duration::from_millis(wait_ms));
            }
            done => return done,
        }
    }
    attempt()
}

/// Files below a folder, with `/` between the parts of their names.
fn walk(folder: &Path, prefix: &str, files: &mut Vec<String>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        match entry.path().is_dir() {
            true => walk(&entry.path(), &format!("{name}/"), files),
            false => files.push(name),
        }
    }
}

/// The status the server answered with, if it answered.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(code) => Some(code),
            _ => None,
        },
        ApiError::TooManyRetries(error) => status(error),
        _ => None,
    }
}

/// No answer, or the server is unwell: not the fault of the request.
fn is_unreachable(error: &ApiError) -> bool {
    match (status(error), error) {
        (Some(code), _) => code >= 500 || code == 429,
        (None, ApiError::RequestError(_)) => true,
        (None, ApiError::IoError(error)) => !is_disk(error),
        _ => false,
    }
}

/// Whether an input or output error comes from the disk and not from a socket.
fn is_disk(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{
        NotADirectory, NotFound, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull,
    };
    matches!(
        error.kind(),
        StorageFull | QuotaExceeded | PermissionDenied | ReadOnlyFilesystem | NotFound | NotADirectory
    )
}

fn hub_error(hub: &HubSettings, id: &str, what: &str, error: &ApiError) -> HfError {
    let (repo, _) = parse_id(id).unwrap_or((id, ""));
    let endpoint = &hub.endpoint;
    let (reason, hint) = match (status(error), error) {
        (Some(401), _) => (
            "the server asks for a login (401)".to_string(),
            "check the name: the hub also answers so where a repository does not exist; for a private one set HF_TOKEN"
                .to_string(),
        ),
        (Some(403), _) => (
            "access denied (403)".to_string(),
            format!("accept the licence at {endpoint}/{repo} and set HF_TOKEN to a token of that account"),
        ),
        (Some(404), _) => ("not found (404)".to_string(), "check the name and the revision after the @".to_string()),
        (Some(429), _) => ("too many requests (429)".to_string(), "wait a little, or set HF_TOKEN".to_string()),
        (Some(code), _) => (format!("the server answered {code}"), "try again later".to_string()),
        (None, ApiError::IoError(error)) if is_disk(error) => {
            let cache = hub.cache.display();
            (
                format!("writing into the cache {cache}: {error}"),
                "free some space, or set HF_HOME to another folder".to_string(),
            )
        }
        (None, ApiError::LockAcquisition(lock)) => (
            format!("{} is locked", lock.display()),
            "another program is downloading the same file: wait for it".to_string(),
        ),
        (None, ApiError::InvalidResume) => (
            "a half-downloaded file is longer than the whole".to_string(),
            format!("remove the *.part files under {}", hub.cache.display()),
        ),
        (None, ApiError::MissingHeader(_) | ApiError::InvalidHeader(_) | ApiError::ParseIntError(_)) => {
            (format!("the answer is not a hub's: {error}"), "check HF_ENDPOINT and any proxy in between".to_string())
        }
        (None, error) => (
            format!("no answer: {error}"),
            "check the network and HF_ENDPOINT; with the files in the cache or in a folder no network is needed"
                .to_string(),
        ),
    };
    hub_failure(hub, id, what, reason, hint)
}

fn hub_failure(hub: &HubSettings, id: &str, what: &str, reason: String, hint: impl Into<String>) -> HfError {
    HfError::Hub {
        endpoint: hub.endpoint.clone(),
        repo: id.to_string(),
        what: what.to_string(),
        reason,
        hint: hint.into(),
    }
}

fn not_in_cache(hub: &HubSettings, id: &str, what: &str) -> HfError {
    let known = super::names_in(&hub.cache);
    let known: Vec<String> =
        known.iter().filter_map(|name| name.strip_prefix("models--")).map(|name| name.replace("--", "/")).collect();
    let why = if hub.offline { "HF_HUB_OFFLINE is set" } else { "the server cannot be reached" };
    let reason =
        format!("{why}, and it is not in the cache {} (models there: {})", hub.cache.display(), list(&known, 8));
    hub_failure(hub, id, what, reason, "run once with a network, or give a folder")
}

fn bad_name(given: &str, reason: impl Into<String>, hint: &str) -> HfError {
    HfError::BadName { given: given.to_string(), reason: reason.into(), hint: hint.to_string() }
}
