"""Says where this Python and its own library lie: what a confined one may read."""

import importlib
import json
import os
import sys
import sysconfig

paths = sysconfig.get_paths()
extensions = os.path.join(paths["platstdlib"], "lib-dynload")
# Extension modules are imported so that the libraries they need are mapped and can be listed.
for name in sorted(os.listdir(extensions)) if os.path.isdir(extensions) else []:
    module = name.partition(".")[0]
    if not module.startswith(("_test", "xx")):
        try:
            importlib.import_module(module)
        except Exception:
            pass
with open("/proc/self/maps") as maps:
    mapped = {line.split(maxsplit=5)[-1].strip() for line in maps if "/" in line}
libraries = sorted(path for path in mapped if ".so" in os.path.basename(path) and os.path.isfile(path))
found = {
    "executable": os.path.realpath(sys.executable),
    "version": "%d.%d.%d" % sys.version_info[:3],
    "folders": sorted({paths["stdlib"], paths["platstdlib"]}),
    "libraries": libraries,
}
print(json.dumps(found))
