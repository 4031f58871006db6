{{/* SPDX-License-Identifier: Apache-2.0 */}}
{{/* From values to the service's WARMFLEET_* variables. files/defaults.yaml has the service's own defaults. */}}

{{/* The variable of a setting: maxBatchTokens -> WARMFLEET_MAX_BATCH_TOKENS. */}}
{{- define "warmfleet.variable" -}}
WARMFLEET_{{ . | snakecase | upper }}
{{- end -}}

{{/* A value as a variable has it: Helm's numbers are floats, and would print 2000000 as 2e+06. */}}
{{- define "warmfleet.text" -}}
{{- if kindIs "slice" . -}}
  {{- join "," . -}}
{{- else if and (kindIs "float64" .) (eq . (floor .)) -}}
  {{- int64 . -}}
{{- else -}}
  {{- toString . -}}
{{- end -}}
{{- end -}}

{{/* A setting, or the service's default of it: (list root "gracefulTimeout"). */}}
{{- define "warmfleet.setting" -}}
{{- $root := index . 0 -}}
{{- $name := index . 1 -}}
{{- $value := index $root.Values.settings $name -}}
{{- if kindIs "invalid" $value }}{{ $value = index ($root.Files.Get "files/defaults.yaml" | fromYaml) $name }}{{ end -}}
{{- include "warmfleet.text" $value -}}
{{- end -}}

{{/* Likewise, of a setting in seconds: whole ones, rounded up. */}}
{{- define "warmfleet.seconds" -}}
{{- include "warmfleet.setting" . | float64 | ceil | int -}}
{{- end -}}

{{/* Whether the service may have to ask the hub for its model; empty for no. */}}
{{- define "warmfleet.fromHub" -}}
{{- $id := .Values.model.id -}}
{{- if and $id (not (hasPrefix "package:" $id)) (not (regexMatch "^[/~.]" $id)) (not .Values.model.offline) -}}
yes
{{- end -}}
{{- end -}}

{{/* The data of the ConfigMap. */}}
{{- define "warmfleet.environment" -}}
{{- $values := .Values -}}
{{- $found := dict
  "WARMFLEET_BIND" (printf "%s:%v" $values.listenHost $values.ports.api)
  "WARMFLEET_OPS_BIND" (printf "%s:%v" $values.listenHost $values.ports.ops)
  "WARMFLEET_DEVICE" (ternary "cuda" "cpu" $values.gpu.enabled)
-}}
{{- range $name := list "workers" "maxWorkers" "readyQuorum" "readyFloor" "budgetPolicy" "gpuMemoryUtilization" "gpuMemoryLimit" "hostMemoryUtilization" -}}
  {{- $text := include "warmfleet.text" (get $values $name | default "") -}}
  {{- if $text }}{{ $_ := set $found (include "warmfleet.variable" $name) $text }}{{ end -}}
{{- end -}}
{{- with $values.model.id }}{{ $_ := set $found "WARMFLEET_MODEL_ID" . }}{{ end -}}
{{- with $values.model.revision }}{{ $_ := set $found "WARMFLEET_REVISION" . }}{{ end -}}
{{- if $values.model.offline }}{{ $_ := set $found "HF_HUB_OFFLINE" "1" }}{{ end -}}
{{- if $values.apiKeys.existingSecret }}{{ $_ := set $found "WARMFLEET_API_KEY_FILE" "/run/secrets/warmfleet/keys" }}{{ end -}}
{{- range $name, $value := $values.settings -}}
  {{- if not (kindIs "invalid" $value) }}{{ $_ := set $found (include "warmfleet.variable" $name) (include "warmfleet.text" $value) }}{{ end -}}
{{- end -}}
{{- toYaml $found -}}
{{- end -}}

{{/* Label matchers of this Deployment's series, whose job is its name by either monitor; rules and queries in files/ have job="warmfleet" in their place. */}}
{{- define "warmfleet.metricsSelector" -}}
{{- .Values.metricsSelector | default (printf "namespace=%q,job=%q" .Release.Namespace (include "warmfleet.fullname" .)) -}}
{{- end -}}

{{/* A file of rules or queries, about this release. */}}
{{- define "warmfleet.queries" -}}
{{- $root := index . 0 -}}
{{- $root.Files.Get (index . 1) | replace "job=\"warmfleet\"" (include "warmfleet.metricsSelector" $root) -}}
{{- end -}}
