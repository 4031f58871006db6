{{/* SPDX-License-Identifier: Apache-2.0 */}}
{{/* The arithmetic: how much memory a pod gets, and how long it may take to start and to stop. */}}

{{/* A quantity in bytes: 1.5Gi -> 1610612736. The schema lets only texts through, so that none is in scientific form. */}}
{{- define "warmfleet.bytes" -}}
{{- $units := dict "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 -}}
{{- mulf (regexFind "^[0-9.]+" . | float64) (get $units (regexFind "[A-Za-z]+$" .) | default 1.0) | int64 -}}
{{- end -}}

{{/* The workers to size a pod for; 0 where `auto` has no bound. */}}
{{- define "warmfleet.mostWorkers" -}}
{{- ternary (.Values.maxWorkers | default 0) .Values.workers (eq (toString .Values.workers) "auto") | int -}}
{{- end -}}

{{/* Bytes that so many workers need, before the share that may be used. */}}
{{- define "warmfleet.neededBytes" -}}
{{- $worker := include "warmfleet.bytes" .Values.worker.hostMemory | int64 -}}
{{- $workers := include "warmfleet.mostWorkers" . | int64 -}}
{{- $base := include "warmfleet.bytes" .Values.worker.baseMemory | int64 -}}
{{- add $base (mul $workers $worker) (include "warmfleet.bytes" .Values.shmSize | int64) -}}
{{- end -}}

{{/* Memory of which `hostMemoryUtilization` holds all that, in steps of 64Mi. */}}
{{- define "warmfleet.memory" -}}
{{- $steps := divf (include "warmfleet.neededBytes" . | float64) (.Values.hostMemoryUtilization | float64) 67108864.0 -}}
{{- mul (ceil $steps | int64) 64 -}}Mi
{{- end -}}

{{/* Requests and limits: what is given, else derived. CPU has no limit: the kernel would stop whole workers by it. */}}
{{- define "warmfleet.resources" -}}
{{- $given := deepCopy .Values.resources -}}
{{- $memory := dig "limits" "memory" (include "warmfleet.memory" .) $given -}}
{{- $workers := include "warmfleet.mostWorkers" . | int | default 1 -}}
{{- $cpu := mulf $workers (.Values.worker.cpu | float64) -}}
{{- $derived := dict "requests" (dict "cpu" (printf "%.0fm" (mulf $cpu 1000.0 | ceil)) "memory" $memory) "limits" (dict "memory" $memory) -}}
{{- if dig "limits" "cpu" "" $given }}{{ $_ := unset $derived.requests "cpu" }}{{ end -}}
{{- $all := mergeOverwrite $derived $given -}}
{{- if and .Values.gpu.enabled .Values.gpu.dra.enabled -}}
  {{- $_ := set $all "claims" (list (dict "name" "gpu")) -}}
{{- else if .Values.gpu.enabled -}}
  {{- range $part := list "requests" "limits" }}{{ $_ := set (get $all $part) $.Values.gpu.resourceName (int $.Values.gpu.count) }}{{ end -}}
{{- end -}}
{{- toYaml $all -}}
{{- end -}}

{{/* Most seconds that a boot may take: each try has the deadlines of its stages, and loads wait for each other. */}}
{{- define "warmfleet.bootSeconds" -}}
{{- $workers := include "warmfleet.mostWorkers" . | int | default 1 -}}
{{- $lanes := include "warmfleet.setting" (list . "concurrentLoads") | int | default (ternary (int .Values.gpu.count) $workers .Values.gpu.enabled) -}}
{{- $turns := ceil (divf ($workers | float64) ($lanes | float64)) | int -}}
{{- $turn := add (include "warmfleet.seconds" (list . "loadTimeout") | int) (include "warmfleet.seconds" (list . "warmupTimeout") | int) -}}
{{- $try := add (include "warmfleet.seconds" (list . "spawnTimeout") | int) (mul $turns $turn) -}}
{{- $download := ternary (include "warmfleet.seconds" (list . "downloadTimeout") | int) 0 (and (ne (include "warmfleet.fromHub" .) "") (not .Values.model.initDownload)) -}}
{{- add $download (mul (include "warmfleet.setting" (list . "bootAttempts") | int) $try) -}}
{{- end -}}

{{- define "warmfleet.startupFailures" -}}
{{- .Values.startupProbe.failureThreshold | default (ceil (divf (include "warmfleet.bootSeconds" . | float64) (.Values.startupProbe.periodSeconds | float64))) | int -}}
{{- end -}}

{{- define "warmfleet.startupSeconds" -}}
{{- mul (include "warmfleet.startupFailures" . | int) (.Values.startupProbe.periodSeconds | int) -}}
{{- end -}}

{{- define "warmfleet.progressDeadline" -}}
{{- .Values.progressDeadlineSeconds | default (add (include "warmfleet.startupSeconds" . | int) (.Values.minReadySeconds | int) 300) | int -}}
{{- end -}}

{{- define "warmfleet.graceSeconds" -}}
{{- $drain := include "warmfleet.seconds" (list . "gracefulTimeout") | int -}}
{{- .Values.terminationGracePeriodSeconds | default (add (.Values.preStopSeconds | int) $drain 10) | int -}}
{{- end -}}

{{/* Fewest and most pods, whoever decides. */}}
{{- define "warmfleet.fewestPods" -}}
{{- ternary .Values.hpa.minReplicas (ternary .Values.keda.minReplicas .Values.replicas .Values.keda.enabled) .Values.hpa.enabled | int -}}
{{- end -}}

{{- define "warmfleet.mostPods" -}}
{{- ternary .Values.hpa.maxReplicas (ternary .Values.keda.maxReplicas .Values.replicas .Values.keda.enabled) .Values.hpa.enabled | int -}}
{{- end -}}
