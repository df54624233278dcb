//! An API server over real HTTPS that keeps Secrets, ConfigMaps and Pods as a real one does: versions, 404, 409; and that can be told to fail,
//! to forbid, and to keep answers back. Services of one cluster in folders of their own.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{Method, StatusCode, Uri},
};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::{bed::Bed, kubernetes::TlsListener};

type Said = (StatusCode, [(&'static str, &'static str); 1], String);

/// Method and the beginning of a path.
pub type Asked = (Method, &'static str);

/// What was to be deleted, by which preconditions, and whether they were met.
#[derive(Clone)]
pub struct Deletion {
    pub path: String,
    pub conditions: Vec<String>,
    pub done: bool,
}

#[derive(Default)]
struct Inner {
    objects: BTreeMap<String, Value>,
    version: u64,
    fails: HashMap<Asked, u16>,
    /// So many requests are answered together, once.
    gather: Option<(Asked, usize)>,
    gathered: usize,
    /// Answered when nobody holds it any more.
    held: Option<Asked>,
    asked: Vec<String>,
    deletions: Vec<Deletion>,
    /// API servers before 1.30 do not name the node.
    names_pods_alone: bool,
    /// Pods that its cache does not know yet.
    uncached: Vec<String>,
}

pub struct FakeCluster {
    pub address: SocketAddr,
    inner: Mutex<Inner>,
    news: watch::Sender<u64>,
    /// Where the API server's own root and the services' token are.
    files: Bed,
}

impl FakeCluster {
    pub async fn start() -> Arc<Self> {
        let files = Bed::files("");
        let (listener, address) = TlsListener::start(&files).await;
        let cluster = Arc::new(Self { address, inner: Mutex::default(), news: watch::Sender::new(0), files });
        let router = Router::new().fallback(answer).with_state(Arc::clone(&cluster));
        tokio::spawn(async move { axum::serve(listener, router).await });
        cluster
    }

    /// The files of one service of this cluster.
    pub fn service(&self) -> Bed {
        self.service_at("127.0.0.1:0")
    }

    pub fn service_at(&self, listen: &str) -> Bed {
        let bed = Bed::files("");
        let text = format!(
            "apiVersion: marline.io/v1alpha1\nkind: CaServer\nspec:\n  cluster: {{}}\n  listen: {{address: \"{listen}\", names: [ca.test, 127.0.0.1]}}\n  status: {{address: \"127.0.0.1:0\"}}\n  authentication: {{kubernetes: {{server: {{address: \"https://{}\", rootCert: {}, tokenFile: {}}}}}}}\n",
            self.address,
            self.files.path("api/root-cert.pem").display(),
            self.files.path("api-token").display(),
        );
        bed.write("ca.yaml", &text);
        bed
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    pub fn object(&self, kind: &str, name: &str) -> Option<Value> {
        self.lock().objects.get(&format!("/api/v1/namespaces/marline-system/{kind}/{name}")).cloned()
    }

    pub fn root(&self) -> String {
        self.object("configmaps", "marline-root").expect("no roots")["data"]["root.pem"].as_str().unwrap().to_owned()
    }

    /// Somebody else's write.
    pub fn write(&self, kind: &str, name: &str, change: impl FnOnce(&mut Value)) {
        let mut inner = self.lock();
        inner.version += 1;
        let version = inner.version.to_string();
        let path = format!("/api/v1/namespaces/marline-system/{kind}/{name}");
        let object = inner.objects.entry(path).or_insert_with(
            || json!({"metadata": {"name": name, "namespace": "marline-system", "uid": format!("uid-{version}")}}),
        );
        change(object);
        object["metadata"]["resourceVersion"] = json!(version);
    }

    pub fn delete(&self, kind: &str, name: &str) {
        self.lock().objects.remove(&format!("/api/v1/namespaces/marline-system/{kind}/{name}"));
    }

    pub fn pod(&self, namespace: &str, name: &str, account: &str, node: &str) {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "uid": format!("uid-{name}")},
            "spec": {"serviceAccountName": account, "nodeName": node, "containers": []},
            "status": {"phase": "Running"},
        });
        self.lock().objects.insert(format!("/api/v1/namespaces/{namespace}/pods/{name}"), pod);
    }

    pub fn change_pod(&self, namespace: &str, name: &str, change: impl FnOnce(&mut Value)) {
        change(self.lock().objects.get_mut(&format!("/api/v1/namespaces/{namespace}/pods/{name}")).unwrap());
    }

    pub fn is_not_cached(&self, name: &str) {
        self.lock().uncached.push(name.to_owned());
    }

    pub fn names_pods_alone(&self) {
        self.lock().names_pods_alone = true;
    }

    /// From now on. 0: as it should be.
    pub fn fails(&self, method: Method, path: &'static str, status: u16) {
        self.lock().fails.insert((method, path), status);
    }

    /// The next so many requests like this are answered when all of them have come.
    pub fn gathers(&self, method: Method, path: &'static str, count: usize) {
        let mut inner = self.lock();
        (inner.gather, inner.gathered) = (Some(((method, path), count)), 0);
    }

    /// Every request so far, by its method and its path.
    pub fn all_asked(&self) -> Vec<String> {
        self.lock().asked.clone()
    }

    /// Requests like this are answered when this is called again with None.
    pub fn holds(&self, asked: Option<Asked>) {
        self.lock().held = asked;
        self.news.send_modify(|news| *news += 1);
    }

    pub fn deletions(&self) -> Vec<Deletion> {
        self.lock().deletions.clone()
    }

    pub fn asked(&self, begins: &str) -> usize {
        self.lock().asked.iter().filter(|asked| asked.starts_with(begins)).count()
    }
}

async fn answer(State(cluster): State<Arc<FakeCluster>>, method: Method, uri: Uri, body: Bytes) -> Said {
    let path = uri.path().to_owned();
    let fits = |asked: &Asked| asked.0 == method && path.starts_with(asked.1);
    let mut news = cluster.news.subscribe();
    let target = {
        let mut inner = cluster.lock();
        inner.asked.push(format!("{method} {path}"));
        inner.gather.clone().filter(|(asked, count)| fits(asked) && inner.gathered < *count).map(|(_, count)| {
            inner.gathered += 1;
            count
        })
    };
    if let Some(count) = target {
        cluster.news.send_modify(|news| *news += 1);
        news.wait_for(|_| cluster.lock().gathered >= count).await.unwrap();
    }
    news.wait_for(|_| !cluster.lock().held.as_ref().is_some_and(fits)).await.unwrap();
    let mut inner = cluster.lock();
    let failing = inner.fails.iter().find(|(asked, status)| fits(asked) && **status != 0).map(|(_, status)| *status);
    if let Some(status) = failing {
        return refused(status, "told to");
    }
    let body: Value = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() };
    if path == "/apis/authentication.k8s.io/v1/tokenreviews" {
        return reviewed(&inner, &body);
    }
    if method == Method::GET && path.ends_with("/pods") {
        return listed(&inner, &path, uri.query().unwrap_or_default());
    }
    if method == Method::GET && path.ends_with("/configmaps") {
        return labelled(&inner, &path, uri.query().unwrap_or_default());
    }
    let version = inner.version + 1;
    let object = |body: Value| {
        let mut object = body;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        object["metadata"]["namespace"] = json!("marline-system");
        object
    };
    match method {
        Method::GET => match inner.objects.get(&path) {
            Some(found) => said(200, found.clone()),
            None => refused(404, "not found"),
        },
        Method::POST => {
            let path = format!("{path}/{}", body["metadata"]["name"].as_str().unwrap());
            if inner.objects.contains_key(&path) {
                return refused(409, "already exists");
            }
            let mut new = object(body);
            new["metadata"]["uid"] = json!(format!("uid-{version}"));
            inner.version = version;
            inner.objects.insert(path, new.clone());
            said(201, new)
        }
        Method::PUT => {
            let Some(known) = inner.objects.get(&path) else { return refused(404, "not found") };
            if known["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"] {
                return refused(409, "the object has been modified");
            }
            let new = object(body);
            inner.version = version;
            inner.objects.insert(path, new.clone());
            said(200, new)
        }
        Method::DELETE => {
            let Some(known) = inner.objects.get(&path) else { return refused(404, "not found") };
            let conditions = body["preconditions"].as_object().unwrap();
            let done = conditions.iter().all(|(field, value)| known["metadata"][field] == *value);
            let conditions = conditions.keys().cloned().collect();
            inner.deletions.push(Deletion { path: path.clone(), conditions, done });
            if !done {
                return refused(409, "the object has been modified");
            }
            inner.objects.remove(&path);
            said(200, json!({"apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Success"}))
        }
        _ => refused(405, "no such method"),
    }
}

/// A token is `pod:NAMESPACE/ACCOUNT/POD`, and counts while its pod is there.
fn reviewed(inner: &Inner, body: &Value) -> Said {
    let token = body["spec"]["token"].as_str().unwrap();
    // Without it, some would look like those of a file.
    let mut parts = token.strip_prefix("pod:").unwrap_or_default().split('/');
    let (namespace, account, pod) =
        (parts.next().unwrap(), parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let known = inner.objects.get(&format!("/api/v1/namespaces/{namespace}/pods/{pod}"));
    let status = match known {
        Some(known) if known["spec"]["serviceAccountName"] == account => {
            let mut extra = json!({
                "authentication.kubernetes.io/pod-name": [pod],
                "authentication.kubernetes.io/pod-uid": [format!("uid-{pod}")],
            });
            if !inner.names_pods_alone {
                extra["authentication.kubernetes.io/node-name"] = json!([known["spec"]["nodeName"]]);
            }
            json!({"authenticated": true, "audiences": body["spec"]["audiences"],
                "user": {"username": format!("system:serviceaccount:{namespace}:{account}"), "extra": extra}})
        }
        _ => json!({"error": "invalid bearer token"}),
    };
    said(
        201,
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "metadata": {}, "spec": body["spec"], "status": status}),
    )
}

fn pairs(query: &str) -> HashMap<String, String> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (key.to_owned(), percent(value))).collect()
}

/// By one label, in pages: where the next one begins is the path of its first object.
fn labelled(inner: &Inner, path: &str, query: &str) -> Said {
    let query = pairs(query);
    let (label, value) = query["labelSelector"].split_once('=').unwrap();
    let first = query.get("continue").cloned().unwrap_or_default();
    let fits = |(at, object): &(&String, &Value)| {
        at.starts_with(&format!("{path}/")) && **at >= first && object["metadata"]["labels"][label] == value
    };
    let mut found = inner.objects.iter().filter(fits);
    let page: Vec<&Value> = found.by_ref().take(query["limit"].parse().unwrap()).map(|(_, object)| object).collect();
    let next = found.next().map(|(at, _)| at.as_str()).unwrap_or_default();
    let metadata = json!({"resourceVersion": "1", "continue": next});
    said(200, json!({"apiVersion": "v1", "kind": "ConfigMapList", "metadata": metadata, "items": page}))
}

fn listed(inner: &Inner, path: &str, query: &str) -> Said {
    let query = pairs(query);
    let cached = query.get("resourceVersion").is_some_and(|version| version == "0");
    let fits = |pod: &Value| {
        query["fieldSelector"].split(',').all(|term| match term.split_once("!=") {
            Some((field, value)) => at(pod, field) != value,
            None => term.split_once('=').is_some_and(|(field, value)| at(pod, field) == value),
        })
    };
    let items: Vec<&Value> = inner
        .objects
        .iter()
        .filter(|(key, _)| key.starts_with(&format!("{path}/")))
        .map(|(_, pod)| pod)
        .filter(|pod| !(cached && inner.uncached.iter().any(|name| pod["metadata"]["name"] == **name)))
        .filter(|pod| fits(pod))
        .collect();
    said(200, json!({"apiVersion": "v1", "kind": "PodList", "metadata": {"resourceVersion": "1"}, "items": items}))
}

fn at<'a>(pod: &'a Value, field: &str) -> &'a str {
    field.split('.').fold(pod, |value, part| &value[part]).as_str().unwrap_or_default()
}

fn percent(text: &str) -> String {
    let text = text.replace('+', " ");
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, more @ ..] = rest {
        if *first == b'%' {
            bytes.push(u8::from_str_radix(std::str::from_utf8(&more[..2]).unwrap(), 16).unwrap());
            rest = &more[2..];
        } else {
            bytes.push(*first);
            rest = more;
        }
    }
    String::from_utf8(bytes).unwrap()
}

fn refused(status: u16, why: &str) -> Said {
    let reason = match status {
        404 => "NotFound",
        409 => "Conflict",
        403 => "Forbidden",
        _ => "InternalError",
    };
    said(
        status,
        json!({"apiVersion": "v1", "kind": "Status", "status": "Failure", "message": why, "reason": reason, "code": status}),
    )
}

fn said(status: u16, body: Value) -> Said {
    (StatusCode::from_u16(status).unwrap(), [("content-type", "application/json")], body.to_string())
}
