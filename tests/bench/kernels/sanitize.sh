#!/bin/bash
# compute-sanitizer over the specialised attention kernels at small sizes: sanitize.sh KERNELS_FOLDER OUT. Only their launches are checked (torch's
# own are not), without torch's pool of memory, so that an access past a buffer is seen. Log: OUT/sanitize.log; ends with 1 if a tool found anything.
set -u
here=$(dirname "$0")
log=$2/sanitize.log
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
status=0
: > "$log"
python3 -u "$here/attention.py" "$1" "$2" 0 sanitize >> "$log" 2>&1 || status=1 # Builds, and runs once without a tool.
for tool in memcheck racecheck; do
    echo "== $tool" >> "$log"
    timeout 60 compute-sanitizer --tool $tool --error-exitcode 9 --print-limit 20 --report-api-errors no --kernel-name kns=paged_ --kernel-name kns=segment_ \
        python3 -u "$here/attention.py" "$1" "$2" 0 sanitize >> "$log" 2>&1
    code=$?
    grep -q "all ran" <(tail -n 12 "$log") || code=8
    echo "$tool: exit code $code" | tee -a "$log"
    [ $code = 0 ] || status=1
done
rm -f "$2"/*.cubin
grep -E "ERROR SUMMARY|RACECHECK SUMMARY" "$log"
exit $status
