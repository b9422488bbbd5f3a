//! `vm`: the machine that a container asks for.

use std::path::PathBuf;

use serde_json::Value;

/// What of `vm` (runtime-spec 1.3) is honoured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vm {
    /// The guest's kernel instead of our own.
    pub kernel: Option<PathBuf>,
    /// Its processors.
    pub vcpus: Option<u64>,
    /// Its memory, bytes.
    pub memory: Option<u64>,
}

impl Vm {
    /// Reads `vm` of a config.json.
    ///
    /// # Errors
    /// It asks for what cannot be had: another hypervisor than this one, say.
    pub(super) fn read(spec: &Value) -> Result<Self, String> {
        let Some(vm) = spec.get("vm").filter(|vm| !vm.is_null()) else { return Ok(Self::default()) };
        let mut read = Self::default();
        for (part, value) in vm.as_object().ok_or("vm is no object")? {
            for (name, value) in value.as_object().ok_or_else(|| format!("vm.{part} is no object"))? {
                let wrong = || format!("vm.{part}.{name}: {value} is not what is expected there");
                match (part.as_str(), name.as_str()) {
                    ("kernel", "path") => {
                        let path = PathBuf::from(value.as_str().ok_or_else(wrong)?);
                        read.kernel = Some(path).filter(|path| path.is_absolute());
                        read.kernel.as_ref().ok_or_else(wrong)?;
                    }
                    ("hwConfig", "vcpus") => read.vcpus = Some(value.as_u64().ok_or_else(wrong)?),
                    ("hwConfig", "memory") => read.memory = Some(value.as_u64().ok_or_else(wrong)?),
                    _ if matches!(value.as_array().map(Vec::as_slice), Some([])) => {}
                    _ => {
                        return Err(format!(
                            "vm.{part}.{name} is not supported: vm.kernel.path, vm.hwConfig.vcpus and vm.hwConfig.memory are"
                        ));
                    }
                }
            }
        }
        Ok(read)
    }
}
