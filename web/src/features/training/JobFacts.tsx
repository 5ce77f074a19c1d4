import { gpusQuery } from '@/features/gpus/queries';
import type { Concept, DataKind, Job, LayerSpec } from '@/types/api';
import { Badge, Text } from '@mantine/core';
import { useQuery } from '@tanstack/react-query';
import type { ReactNode } from 'react';
import { useTranslation } from 'react-i18next';
import { useHyperWords } from './HyperForm';
import { CHOICES, CLASS_PICTURES, HYPER, type ChoiceName, type HyperName } from './form';
import css from './JobPage.module.css';
import { methodWords } from './LayersForm';
import type { Progress } from './progress';
import { fileQuery } from '@/features/files/queries';

/** How the job was asked for, and what became of what was left on "auto". */
export function Facts({ job, progress, kind }: { job: Job; progress: Progress; kind: DataKind }) {
  const { t } = useTranslation();
  const words = useHyperWords(kind);
  const ofPictures = kind === 'pictures';
  const gpus = useQuery({ ...gpusQuery, refetchInterval: false });
  const gpu = gpus.data?.find((each) => each.id === job.gpu);
  const settings = HYPER.flatMap((name): [string, ReactNode][] => {
    const given = job.hyperparameters[name];
    const asked = given !== undefined && given !== null && given !== 'auto';
    const value = asked ? given : progress.chosen[name];
    if (value === undefined || value === null || value === 'auto') return [];
    const mark = asked ? null : (
      <Badge size="xs" variant="light" ml={6}>
        {t('run.chosen')}
      </Badge>
    );
    return [
      [
        words(name),
        <>
          <Words name={name} value={value} />
          {mark}
        </>,
      ],
    ];
  });
  const rows: [string, ReactNode][] = [
    [t('training.stepModel'), job.model],
    [t(ofPictures ? 'pictured.dataTitle' : 'job.examples'), <FileName key="training" id={job.training_file} />],
    ...(job.validation_file
      ? [
          [
            t(ofPictures ? 'pictured.validation' : 'run.validationFile'),
            <FileName key="valid" id={job.validation_file} />,
          ] as [string, ReactNode],
        ]
      : []),
    ...(job.concept
      ? [[t('pictured.concepts'), <Shows key="concept" concept={job.concept} />] as [string, ReactNode]]
      : []),
    [t('training.layers'), job.layers.map((spec, i) => <Spec key={i} spec={spec} />)],
    ...settings,
    ...(job.gpu ? [[t('job.gpu'), gpu?.name ?? job.gpu] as [string, ReactNode]] : []),
    ...(job.attempts > 0 ? [[t('job.attempts'), job.attempts] as [string, ReactNode]] : []),
    ...(progress.seen
      ? [[t(ofPictures ? 'pictured.tokens' : 'job.tokens'), progress.seen.toLocaleString()] as [string, ReactNode]]
      : []),
  ];
  return (
    <>
      <dl className={css.facts}>
        {rows.map(([name, value]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd>{value}</dd>
          </div>
        ))}
      </dl>
      {Object.keys(progress.chosen).length > 0 ? (
        <Text size="xs" c="dimmed">
          {t('run.chosenText')}
        </Text>
      ) : null}
    </>
  );
}

function Words({ name, value }: { name: HyperName; value: unknown }) {
  const { t } = useTranslation();
  if (typeof value === 'boolean') return t(value ? 'hyper.yes' : 'hyper.no');
  if (typeof value === 'number') return Number(value.toPrecision(4)).toString();
  const choices = name in CHOICES ? (CHOICES[name as ChoiceName] as readonly string[]) : [];
  const text = String(value);
  return choices.includes(text) ? t(`hyper.${name}_${text}` as 'hyper.schedule_linear') : text;
}

function FileName({ id }: { id: string }) {
  const { t } = useTranslation();
  const file = useQuery(fileQuery(id)).data;
  const rows = file?.kind === 'pictures' ? 'pictured.rows' : 'training.rows';
  return file ? `${file.filename} · ${t(rows, { count: file.rows })}` : id;
}

function Shows({ concept }: { concept: Concept }) {
  const { t } = useTranslation();
  const { prompt, class_prompt: ofKind, class_pictures: count = CLASS_PICTURES, prior_weight: weight = 1 } = concept;
  return (
    <>
      <div>“{prompt}”</div>
      {ofKind ? <div>{t('pictured.conceptClass', { prompt: ofKind, count, weight })}</div> : null}
    </>
  );
}

function Spec({ spec }: { spec: LayerSpec }) {
  const { t } = useTranslation();
  const told = [
    `${t(methodWords(spec.method))} ${spec.method === 'full' ? '' : (spec.rank ?? '')}`.trim(),
    spec.rslora ? 'rsLoRA' : null,
    spec.quantize && spec.quantize !== 'none' ? t(`hyper.quantize_${spec.quantize}`) : null,
    spec.component ?? null,
    spec.parts.join(', '),
    spec.layers,
    spec.match ?? null,
  ];
  return <div>{told.filter(Boolean).join(' · ')}</div>;
}
