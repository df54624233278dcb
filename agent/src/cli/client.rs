//! How commands ask a running agent: its admin address, over HTTP. What is asked for, and what is made of the answer, is each command's.

use std::{net::SocketAddr, time::Duration};

use clap::Args;
use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, StatusCode, body::Bytes};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::{net::TcpStream, runtime::Runtime};

const PATIENCE: Duration = Duration::from_secs(10);

/// Where the agent is, and how to print what it says.
#[derive(Args, Clone, Debug)]
pub(super) struct AdminArgs {
    /// The agent's admin address (spec.admin.address)
    #[arg(long, global = true, env = "MARLINE_ADMIN", default_value = "127.0.0.1:15000")]
    pub(super) admin: SocketAddr,
    /// Print JSON
    #[arg(long, global = true)]
    pub(super) json: bool,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error("no agent answers at {address}: {what}; is one running, and is --admin its spec.admin.address?")]
    Silent { address: SocketAddr, what: String },
    #[error("what answers at {address} is no agent of Marline, or one of another version: {path}: {what}")]
    Strange { address: SocketAddr, path: String, what: String },
    #[error("the asynchronous runtime")]
    Runtime(#[source] std::io::Error),
}

/// Asks one agent.
pub(super) struct Client {
    address: SocketAddr,
    runtime: Runtime,
}

impl Client {
    pub(super) fn new(address: SocketAddr) -> Result<Self, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Ok(Self { address, runtime: runtime.map_err(ClientError::Runtime)? })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// What is answered, whatever that is.
    pub(super) fn get(&self, path: &str) -> Result<(StatusCode, String), ClientError> {
        self.get_at(self.address, path)
    }

    /// The same at another of the agent's addresses.
    pub(super) fn get_at(&self, address: SocketAddr, path: &str) -> Result<(StatusCode, String), ClientError> {
        let answer = async { tokio::time::timeout(PATIENCE, get(address, path)).await };
        let slow = || Err(format!("it did not answer within {PATIENCE:?}").into());
        let answer = self.runtime.block_on(answer).unwrap_or_else(|_| slow());
        answer.map_err(|error| ClientError::Silent { address, what: error.to_string() })
    }

    /// What is answered, if it is what is expected of an agent.
    pub(super) fn json<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let strange = |what: String| ClientError::Strange { address: self.address, path: path.to_owned(), what };
        match self.get(path)? {
            (StatusCode::OK, text) => serde_json::from_str(&text).map_err(|error| strange(error.to_string())),
            (status, _) => Err(strange(status.to_string())),
        }
    }
}

async fn get(
    address: SocketAddr,
    path: &str,
) -> Result<(StatusCode, String), Box<dyn std::error::Error + Send + Sync>> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get(path).header("host", address.to_string()).body(Empty::<Bytes>::new())?;
    let connection = tokio::spawn(connection);
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    connection.abort();
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}
