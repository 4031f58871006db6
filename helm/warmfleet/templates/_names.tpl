{{/* SPDX-License-Identifier: Apache-2.0 */}}
{{/* What things are called. Names are cut at 52 characters, so that `-ops` and `-cache` still fit a label. */}}

{{- define "warmfleet.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "warmfleet.fullname" -}}
{{- $name := .Values.nameOverride | default .Chart.Name -}}
{{- $long := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- .Values.fullnameOverride | default $long | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "warmfleet.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (ternary (include "warmfleet.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{/* The pods of the service, and no others: the pod of `helm test` has another component. */}}
{{- define "warmfleet.selectorLabels" -}}
app.kubernetes.io/name: {{ include "warmfleet.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "warmfleet.testLabels" -}}
app.kubernetes.io/name: {{ include "warmfleet.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: test
{{- end -}}

{{/* The Service of the ops port, which a ServiceMonitor looks for. */}}
{{- define "warmfleet.opsLabels" -}}
app.kubernetes.io/name: {{ include "warmfleet.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: ops
{{- end -}}

{{/* Labels of an object: (dict "root" . "component" "server" "more" …); no label of the user's replaces the chart's. */}}
{{- define "warmfleet.labels" -}}
{{- $own := include "warmfleet.selectorLabels" .root | fromYaml -}}
{{- $_ := set $own "app.kubernetes.io/component" (.component | default "server") -}}
{{- $_ := set $own "app.kubernetes.io/version" .root.Chart.AppVersion -}}
{{- $_ := set $own "app.kubernetes.io/managed-by" .root.Release.Service -}}
{{- $_ := set $own "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_") -}}
{{- merge $own (.more | default dict) .root.Values.commonLabels | toYaml -}}
{{- end -}}

{{/* Metadata of an object: (dict "root" . "name" "…" "component" "…" "labels" … "annotations" … "namespace" "…"). */}}
{{- define "warmfleet.metadata" -}}
{{- $annotations := merge (deepCopy (.annotations | default dict)) .root.Values.commonAnnotations -}}
name: {{ .name | quote }}
namespace: {{ .namespace | default .root.Release.Namespace | quote }}
labels:
  {{- include "warmfleet.labels" (dict "root" .root "component" .component "more" .labels) | nindent 2 }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The Secrets to pull the image with; a parent chart's may be names or, as in a pod, objects. */}}
{{- define "warmfleet.pullSecrets" -}}
{{- with concat .Values.imagePullSecrets ((.Values.global | default dict).imagePullSecrets | default list) | uniq -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ ternary (get (ternary . dict (kindIs "map" .)) "name") . (kindIs "map" .) | quote }}
  {{- end }}
{{- end -}}
{{- end -}}

{{- define "warmfleet.variant" -}}
{{- .Values.image.variant | default (ternary "cuda" "cpu" .Values.gpu.enabled) -}}
{{- end -}}

{{- define "warmfleet.image" -}}
{{- $registry := (.Values.global | default dict).imageRegistry | default .Values.image.registry -}}
{{- $name := ternary (printf "%s/%s" $registry .Values.image.repository) .Values.image.repository (ne $registry "") -}}
{{- $tag := .Values.image.tag | default (printf "%s-%s" .Chart.AppVersion (include "warmfleet.variant" .)) -}}
{{- ternary (printf "%s@%s" $name .Values.image.digest) (printf "%s:%s" $name $tag) (ne .Values.image.digest "") -}}
{{- end -}}
