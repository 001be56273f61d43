//! Generates the messages and the ttrpc service from `protos/agent.proto`, in pure Rust: no protoc is needed.
use std::{env, fs, path::Path};

use ttrpc_codegen::{Codegen, Customize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=protos/agent.proto");
    let out = env::var("OUT_DIR")?;
    Codegen::new()
        .out_dir(&out)
        .inputs(["protos/agent.proto"])
        .include("protos")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .run()?;
    // The generated files carry inner attributes, so they are modules with a path rather than included text.
    let modules: String = ["agent", "agent_ttrpc"]
        .map(|name| {
            format!(
                "#[path = {:?}]\npub mod {name};\n",
                Path::new(&out).join(format!("{name}.rs"))
            )
        })
        .concat();
    fs::write(Path::new(&out).join("generated.rs"), modules)?;
    Ok(())
}
