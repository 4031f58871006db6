{{/* SPDX-License-Identifier: Apache-2.0 */}}
{{/* Combinations that cannot work, each refused in a sentence. Single values are the schema's business. */}}

{{- define "warmfleet.validate" -}}
{{- $found := list -}}
{{- range $part := list "Model" "Workers" "Memory" "Gpu" "Rollout" "Cache" "Scaling" "Network" "Alerts" "Extras" -}}
  {{- range splitList "\n" (include (printf "warmfleet.validate%s" $part) $) -}}
    {{- with trim . }}{{ $found = append $found (printf "- %s" .) }}{{ end -}}
  {{- end -}}
{{- end -}}
{{- if $found }}{{ fail (printf "these values cannot work:\n%s" (join "\n" $found)) }}{{ end -}}
{{- end -}}

{{- define "warmfleet.validateModel" -}}
{{- $model := .Values.model }}
{{- if and $model.revision (not $model.id) }}
model.revision is set but model.id is not; a revision belongs to a hub model, set model.id too
{{- end }}
{{- if and $model.initDownload (not (include "warmfleet.fromHub" .)) }}
model.initDownload needs a hub id in model.id and model.offline false; there is nothing to download
{{- end }}
{{- end -}}

{{- define "warmfleet.validateWorkers" -}}
{{- $most := include "warmfleet.mostWorkers" . | int }}
{{- $auto := eq (toString .Values.workers) "auto" }}
{{- if and .Values.maxWorkers (not $auto) }}
maxWorkers {{ .Values.maxWorkers }} bounds workers: auto, but workers is {{ .Values.workers }}; drop one of the two
{{- end }}
{{- if and $auto (not .Values.maxWorkers) (not (dig "limits" "memory" "" .Values.resources)) }}
workers: auto grows to what fits, but nothing says how much memory a pod may have; set maxWorkers, or resources.limits.memory
{{- end }}
{{- range $name := list "readyQuorum" "readyFloor" }}
{{- if and $most (gt (get $.Values $name | default 0 | int) $most) }}
{{ $name }} {{ get $.Values $name }} can never be reached with {{ $most }} workers; lower it or add some
{{- end }}
{{- end }}
{{- if and .Values.gpu.enabled $most (lt $most (int .Values.gpu.count)) }}
workers {{ $most }} would leave {{ sub (int .Values.gpu.count) $most }} of {{ .Values.gpu.count }} GPUs idle; set workers to {{ .Values.gpu.count }} or more, or lower gpu.count
{{- end }}
{{- end -}}

{{- define "warmfleet.validateMemory" -}}
{{- $limit := dig "limits" "memory" "" .Values.resources }}
{{- $request := dig "requests" "memory" "" .Values.resources }}
{{- $workers := include "warmfleet.mostWorkers" . | int }}
{{- if $limit }}
{{- $usable := mulf (include "warmfleet.bytes" $limit | float64) (.Values.hostMemoryUtilization | float64) }}
{{- if lt $usable (include "warmfleet.neededBytes" . | float64) }}
resources.limits.memory {{ $limit }} is too small: worker.baseMemory {{ .Values.worker.baseMemory }}, {{ $workers }} workers of worker.hostMemory {{ .Values.worker.hostMemory }} and shmSize {{ .Values.shmSize }} need {{ include "warmfleet.memory" . }} at hostMemoryUtilization {{ .Values.hostMemoryUtilization }}; raise it, or lower workers
{{- end }}
{{- end }}
{{- if $request }}
{{- if gt (include "warmfleet.bytes" $request | int64) (include "warmfleet.bytes" ($limit | default (include "warmfleet.memory" .)) | int64) }}
resources.requests.memory {{ $request }} is above the limit {{ $limit | default (include "warmfleet.memory" .) }}; Kubernetes refuses that, lower it
{{- end }}
{{- end }}
{{- end -}}

{{- define "warmfleet.validateGpu" -}}
{{- $gpu := .Values.gpu }}
{{- $shared := or $gpu.shared (and (hasSuffix ".shared" $gpu.resourceName) (not $gpu.dra.enabled)) }}
{{- if $gpu.enabled }}
{{- if and $shared (not .Values.gpuMemoryLimit) }}
{{ ternary "gpu.shared says that others share the GPU" (printf "%s is a GPU that others share" $gpu.resourceName) $gpu.shared }}, and nothing keeps them apart; set gpuMemoryLimit to this pod's part of its memory
{{- end }}
{{- if and $shared (gt (int $gpu.count) 1) }}
gpu.count {{ $gpu.count }} of a shared GPU may be the same one {{ $gpu.count }} times; set it to 1
{{- end }}
{{- if and $gpu.dra.enabled (semverCompare "<1.34.0-0" .Capabilities.KubeVersion.Version) }}
gpu.dra.enabled needs Kubernetes 1.34 or later, and this is {{ .Capabilities.KubeVersion.Version }}; set it to false
{{- end }}
{{- if eq (include "warmfleet.variant" .) "cpu" }}
image.variant cpu cannot use a GPU; leave it empty, or set gpu.enabled to false
{{- end }}
{{- $backend := include "warmfleet.setting" (list . "backend") }}
{{- if has $backend (list "onnx" "openvino" "stub") }}
settings.backend {{ $backend }} computes on the CPU; set gpu.enabled to false, or the backend to torch
{{- end }}
{{- if eq (include "warmfleet.setting" (list . "preload")) "weights" }}
settings.preload weights works on the CPU only; set it to imports or auto, or gpu.enabled to false
{{- end }}
{{- else if has (include "warmfleet.setting" (list . "dtype")) (list "float16" "bfloat16") }}
settings.dtype {{ include "warmfleet.setting" (list . "dtype") }} without a GPU is about 100 times slower, and refused; set it to auto
{{- end }}
{{- range $part := list "requests" "limits" }}
{{- range $name := dig $part dict $.Values.resources | keys }}
{{- if or (eq $name $gpu.resourceName) (contains "nvidia.com/" $name) }}
resources.{{ $part }} names {{ $name }}; leave it out, gpu.resourceName and gpu.count ask for GPUs
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "warmfleet.validateRollout" -}}
{{- $strategy := .Values.strategy }}
{{- $surge := and (eq $strategy.type "RollingUpdate") (not (has (toString $strategy.maxSurge) (list "0" "0%"))) }}
{{- if and (eq $strategy.type "RollingUpdate") (not $surge) (has (toString $strategy.maxUnavailable) (list "0" "0%")) }}
strategy.maxSurge and strategy.maxUnavailable are both 0, so no pod could ever be replaced; raise one
{{- end }}
{{- if and $surge .Values.gpu.enabled (not .Values.gpu.allowSurge) }}
strategy.maxSurge {{ $strategy.maxSurge }} needs idle GPUs, or the rollout waits for ever while the old pods hold theirs; set it to 0, or gpu.allowSurge to true if there are
{{- end }}
{{- $drain := include "warmfleet.seconds" (list . "gracefulTimeout") | int }}
{{- $least := add (int .Values.preStopSeconds) $drain }}
{{- if le (include "warmfleet.graceSeconds" . | int) ($least | int) }}
terminationGracePeriodSeconds {{ .Values.terminationGracePeriodSeconds }} ends before preStopSeconds {{ .Values.preStopSeconds }} and settings.gracefulTimeout {{ $drain }} are over, and requests would be cut off; set it above {{ $least }}
{{- end }}
{{- $lingers := include "warmfleet.setting" (list . "drainGrace") }}
{{- if ge ($lingers | float64) (include "warmfleet.setting" (list . "gracefulTimeout") | float64) }}
settings.drainGrace {{ $lingers }} must be below settings.gracefulTimeout {{ include "warmfleet.setting" (list . "gracefulTimeout") }}; lower it
{{- end }}
{{- if le (include "warmfleet.progressDeadline" . | int) (include "warmfleet.startupSeconds" . | int) }}
progressDeadlineSeconds {{ .Values.progressDeadlineSeconds }} is over before the startup probe's {{ include "warmfleet.startupSeconds" . }} s are; raise it, or lower startupProbe.failureThreshold
{{- end }}
{{- end -}}

{{- define "warmfleet.validateCache" -}}
{{- $cache := .Values.cache }}
{{- $strategy := .Values.strategy }}
{{- if and (eq $cache.type "existingClaim") (not $cache.existingClaim) }}
cache.type is existingClaim, but cache.existingClaim names none; name it
{{- end }}
{{- if and $cache.existingClaim (ne $cache.type "existingClaim") }}
cache.existingClaim {{ $cache.existingClaim }} is not used while cache.type is {{ $cache.type }}; set that to existingClaim
{{- end }}
{{- if and (ne $cache.type "emptyDir") (has $cache.accessMode (list "ReadWriteOnce" "ReadWriteOncePod")) }}
{{- if gt (include "warmfleet.mostPods" . | int) 1 }}
a {{ $cache.accessMode }} cache serves the pods of one node, and there may be {{ include "warmfleet.mostPods" . }} pods; set cache.accessMode to ReadWriteMany, cache.type to emptyDir, or one replica
{{- end }}
{{- if and (eq $strategy.type "RollingUpdate") (not (has (toString $strategy.maxSurge) (list "0" "0%"))) }}
a {{ $cache.accessMode }} cache cannot be mounted by the new pod while the old one has it; set strategy.maxSurge to 0, or cache.accessMode to ReadWriteMany
{{- end }}
{{- end }}
{{- end -}}

{{/* The pods that podDisruptionBudget.minAvailable keeps of the fewest there may be; a share is rounded up. */}}
{{- define "warmfleet.leastAvailable" -}}
{{- $least := toString .Values.podDisruptionBudget.minAvailable -}}
{{- if hasSuffix "%" $least -}}
{{- divf (mulf (trimSuffix "%" $least | float64) (include "warmfleet.fewestPods" . | float64)) 100.0 | ceil | int -}}
{{- else -}}
{{- $least -}}
{{- end -}}
{{- end -}}

{{- define "warmfleet.validateScaling" -}}
{{- if and .Values.hpa.enabled .Values.keda.enabled }}
hpa.enabled and keda.enabled would make two autoscalers that work against each other; enable one
{{- end }}
{{- range $name := list "hpa" "keda" }}
{{- $scaler := get $.Values $name }}
{{- if and $scaler.enabled (gt (int $scaler.minReplicas) (int $scaler.maxReplicas)) }}
{{ $name }}.minReplicas {{ $scaler.minReplicas }} is above {{ $name }}.maxReplicas {{ $scaler.maxReplicas }}; lower it
{{- end }}
{{- end }}
{{- $pdb := .Values.podDisruptionBudget }}
{{- $fewest := include "warmfleet.fewestPods" . | int }}
{{- if $pdb.enabled }}
{{- if kindIs "invalid" $pdb.minAvailable }}
{{- if has (toString $pdb.maxUnavailable) (list "0" "0%") }}
podDisruptionBudget.maxUnavailable {{ $pdb.maxUnavailable }} would block every drain of a node; set it to 1 or more
{{- end }}
{{- else if and $fewest (ge (include "warmfleet.leastAvailable" . | int) $fewest) }}
podDisruptionBudget.minAvailable {{ $pdb.minAvailable }} of {{ $fewest }} pods would block every drain of a node; lower it, or set maxUnavailable instead
{{- end }}
{{- end }}
{{- end -}}

{{- define "warmfleet.validateNetwork" -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" (include "warmfleet.fullname" .)) }}
{{ include "warmfleet.fullname" . }} cannot name a Service, which has a letter first and then letters, digits and dashes; set fullnameOverride
{{- end }}
{{- if eq (int .Values.ports.api) (int .Values.ports.ops) }}
ports.api and ports.ops are both {{ .Values.ports.api }}; give the ops listener a port of its own
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) }}
ingress.enabled needs a host in ingress.hosts
{{- end }}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) }}
httpRoute.enabled needs a gateway in httpRoute.parentRefs
{{- end }}
{{- if and .Values.podMonitor.enabled .Values.serviceMonitor.enabled }}
podMonitor.enabled and serviceMonitor.enabled would scrape every pod twice; enable one
{{- end }}
{{- if and .Values.networkPolicy.enabled (or .Values.ingress.enabled .Values.httpRoute.enabled) (not .Values.networkPolicy.apiFrom) }}
networkPolicy.enabled keeps the Ingress controller or gateway out; name it in networkPolicy.apiFrom
{{- end }}
{{- if and .Values.networkPolicy.enabled (or .Values.podMonitor.enabled .Values.serviceMonitor.enabled) (not .Values.networkPolicy.metricsFrom) }}
networkPolicy.enabled keeps Prometheus out; name it in networkPolicy.metricsFrom
{{- end }}
{{- end -}}

{{- define "warmfleet.validateAlerts" -}}
{{- $alerts := list }}
{{- if .Values.prometheusRule.overrides }}
{{- range (include "warmfleet.queries" (list . "files/alerts.yaml") | fromYaml).groups }}
{{- range .rules }}{{ $alerts = append $alerts (.alert | default "") }}{{ end }}
{{- end }}
{{- end }}
{{- range $name, $_ := .Values.prometheusRule.overrides }}
{{- if not (has $name $alerts) }}
prometheusRule.overrides names {{ $name }}, which is no alert; docs/monitoring.md lists them
{{- end }}
{{- end }}
{{- end -}}

{{- define "warmfleet.validateExtras" -}}
{{- $names := list }}
{{- $own := list "HF_HOME" "HF_HUB_OFFLINE" "XDG_CACHE_HOME" "CUDA_VISIBLE_DEVICES" "NVIDIA_VISIBLE_DEVICES" }}
{{- range .Values.extraEnv }}
{{- if hasPrefix "WARMFLEET_" .name }}
extraEnv sets {{ .name }}; settings have values of their own, use `settings`
{{- else if has .name $own }}
extraEnv sets {{ .name }}, which is the chart's or the device plugin's business; leave it out
{{- else if has .name $names }}
extraEnv sets {{ .name }} twice, which Kubernetes refuses; leave one out
{{- end }}
{{- $names = append $names .name }}
{{- end }}
{{- $volumes := list "cache" "tmp" "shm" "api-keys" }}
{{- range .Values.extraVolumes }}
{{- if has .name $volumes }}
extraVolumes has {{ .name }}, a name that is taken; rename it
{{- end }}
{{- $volumes = append $volumes .name }}
{{- end }}
{{- range .Values.extraVolumeMounts }}
{{- if has .mountPath (list "/cache" "/tmp" "/dev/shm" "/run/secrets/warmfleet") }}
extraVolumeMounts has {{ .mountPath }}, a path that is taken; mount it elsewhere
{{- end }}
{{- end }}
{{- end -}}
