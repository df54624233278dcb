//! Embeds the eBPF object that `cargo xtask build` made, if it is there; without it the agent builds but refuses to start. Makes the
//! gRPC services that the agent calls or serves from their few methods: no protobuf compiler is needed.
use std::{env, fs, path::PathBuf};

use tonic_build::manual::{Builder, Method, Service};

const CODEC: &str = "tonic_prost::ProstCodec";

fn main() {
    println!("cargo:rerun-if-env-changed=MARLINE_EBPF");
    println!("cargo:rerun-if-changed=build.rs");
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let object =
        env::var_os("MARLINE_EBPF").map_or_else(|| manifest.join("../target/ebpf/marline-ebpf.o"), PathBuf::from);
    println!("cargo:rerun-if-changed={}", object.display());
    let bytes = fs::read(&object).unwrap_or_default();
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("marline-ebpf.o");
    if let Err(error) = fs::write(&out, bytes) {
        println!("cargo:error=cannot write {}: {error}", out.display());
    }
    services();
}

/// The messages are in `identity::wire`.
fn services() {
    let unary = |name, route, input, output| {
        Method::builder().name(name).route_name(route).input_type(input).output_type(output).codec_path(CODEC).build()
    };
    let stream = |name, route, input, output| {
        let method = Method::builder().name(name).route_name(route).input_type(input).output_type(output);
        method.codec_path(CODEC).server_streaming().build()
    };
    let istio = Service::builder().name("IstioCertificateService").package("istio.v1.auth").method(unary(
        "create_certificate",
        "CreateCertificate",
        "super::CertificateRequest",
        "super::CertificateResponse",
    ));
    // The standard gives the Workload API no package.
    let spiffe = Service::builder()
        .name("SpiffeWorkloadAPI")
        .package("")
        .method(stream("fetch_x509_svid", "FetchX509SVID", "super::X509SvidRequest", "super::X509SvidResponse"))
        .method(stream(
            "fetch_x509_bundles",
            "FetchX509Bundles",
            "super::X509BundlesRequest",
            "super::X509BundlesResponse",
        ));
    Builder::new().compile(&[istio.build(), spiffe.build()]);
}
