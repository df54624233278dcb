//! What the CA service keeps at a cluster's API server, so that any number of services can sign side by side with no disk of their own: the
//! key in a Secret (`authority`), the roots in a ConfigMap, and for each node a ledger (`book`), until that holds nothing any more (`sweep`).
//! Every write says which version it was made of, so of two that meet one fails, and is made again of what the other has left. Nobody has
//! to lead.

pub mod authority;
pub mod book;
pub mod placement;
pub mod revoke;
pub mod sweep;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::{Api, Client, Resource, api::PostParams};
use serde::{Serialize, de::DeserializeOwned};
use tokio::time::timeout;

use super::CaError;
use crate::{
    config::{ApiServer, CaCluster},
    words::with_causes,
};

/// Longer than an API server under load takes, and shorter than a client waits.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// How often a write that met another is made again.
const TRIES: usize = 16;

/// A handle on the objects. Cheap to clone.
#[derive(Clone)]
pub struct Cluster {
    pub config_maps: Api<ConfigMap>,
    pub secrets: Api<Secret>,
    client: Client,
    pub names: CaCluster,
}

/// Why the API server did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("it is not there")]
    Absent,
    #[error("somebody else has written it meanwhile")]
    Conflict,
    #[error("{0}")]
    Other(String),
}

impl Cluster {
    pub fn new(names: &CaCluster) -> Result<Self, CaError> {
        let client = client(names.server.as_ref())?;
        Ok(Self {
            config_maps: Api::namespaced(client.clone(), &names.namespace),
            secrets: Api::namespaced(client.clone(), &names.namespace),
            client,
            names: names.clone(),
        })
    }

    pub fn pods_of(&self, namespace: &str) -> Api<Pod> {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// As errors call the Secret.
    fn secret_place(&self) -> PathBuf {
        Path::new("Secret").join(&self.names.namespace).join(&self.names.secret)
    }
}

/// One object, if it is there.
pub(super) async fn get<T: DeserializeOwned + Clone + std::fmt::Debug>(
    api: &Api<T>,
    name: &str,
) -> Result<Option<T>, Fault> {
    match within(api.get(name)).await {
        Ok(object) => Ok(Some(object)),
        Err(Fault::Absent) => Ok(None),
        Err(fault) => Err(fault),
    }
}

/// Makes an object, or replaces the version that it was made of; any other version is a conflict.
pub(super) async fn put<T>(api: &Api<T>, name: &str, object: &T) -> Result<(), Fault>
where
    T: Resource + Serialize + DeserializeOwned + Clone + std::fmt::Debug,
{
    let params = PostParams::default();
    let done = match object.meta().resource_version {
        None => within(api.create(&params, object)).await,
        Some(_) => within(api.replace(name, &params, object)).await,
    };
    match done {
        // It was deleted meanwhile.
        Err(Fault::Absent) if object.meta().resource_version.is_some() => Err(Fault::Conflict),
        other => other.map(drop),
    }
}

pub(super) async fn within<T>(ask: impl Future<Output = kube::Result<T>>) -> Result<T, Fault> {
    match timeout(PATIENCE, ask).await {
        Err(_) => Err(Fault::Other(format!("no answer within {PATIENCE:?}"))),
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) => Err(match status.code {
            404 => Fault::Absent,
            409 => Fault::Conflict,
            401 => Fault::Other("it does not take this service's own token (401)".to_owned()),
            403 => Fault::Other(format!(
                "this service may not do that (403): give it the verbs of docs/certificates.md; {}",
                status.message
            )),
            code => Fault::Other(format!("{} ({code})", status.message)),
        }),
        Ok(Err(error)) => Err(Fault::Other(with_causes(&error))),
    }
}

/// A client of the cluster's API server, or of the one that is named.
pub(super) fn client(server: Option<&ApiServer>) -> Result<Client, CaError> {
    let mut config = match server {
        Some(server) => outside(server)?,
        None => kube::Config::incluster().map_err(|error| CaError::Kubernetes {
            what: "there is no service account of a pod here; name the API server in spec.authentication.kubernetes.server"
                .to_owned(),
            source: Some(Box::new(error)),
        })?,
    };
    config.connect_timeout = Some(PATIENCE);
    config.default_retry = false;
    Client::try_from(config)
        .map_err(|error| CaError::Kubernetes { what: "cannot be talked to".to_owned(), source: Some(Box::new(error)) })
}

fn outside(server: &ApiServer) -> Result<kube::Config, CaError> {
    let wrong = |what: String| CaError::Kubernetes { what, source: None };
    let address = server.address.parse().map_err(|error| wrong(format!("its address {}: {error}", server.address)))?;
    let mut config = kube::Config::new(address);
    for (field, path) in [("rootCert", &server.root_cert), ("tokenFile", &server.token_file)] {
        check_readable(path).map_err(|error| wrong(format!("{field} {}: {error}", path.display())))?;
    }
    config.root_cert_file = Some(server.root_cert.clone());
    config.auth_info.token_file = Some(server.token_file.to_string_lossy().into_owned());
    Ok(config)
}

fn check_readable(path: &Path) -> std::io::Result<()> {
    std::fs::File::open(path).map(drop)
}
